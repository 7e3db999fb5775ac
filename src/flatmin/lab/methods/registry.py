"""The registry: each training method by name, and how it is put together."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..._checks import check_choice, check_number, nearest
from ...averages import EMA, LAWA, SwitchEMA, ema_decay
from ...errors import InvalidArgumentError
from ...losses import MESA, SAF, OnlineLabelSmoothing, logit_squeezing
from .method import Assembled, Ingredients, Method
from .sam_family import FAMILY

# A moving average looks back over this share of the run where nothing else is said: 12 of 60 epochs. The paper's .9998
# is 5,000 steps, or 18 % of its 90 epochs of ImageNet.
EMA_SHARE = 0.2

# Those that are compared where no others are named: each of the paper, and what costs nothing.
COMPARED = ("base", "smoothing", "sam", "saf", "mesa")

HYPERPARAMETERS: dict[str, tuple[type, str]] = {
    "smoothing": (
        float,
        "Label smoothing of the criterion (every method; 0.1 for the method smoothing, else 0).",
    ),
    "rho": (float, "The SAM family: length of the perturbation; gsam: at the highest learning rate."),
    "rho_min": (float, "gsam: rho at a learning rate of 0."),
    "subset": (str, "The SAM family: which parameters are perturbed: all | norm (normalisation layers only)."),
    "when": (
        str,
        "The SAM family: which steps pay for a second pass: always | every:K | late:SHARE | sometimes:PROBABILITY | "
        "adaptive.",
    ),
    "norm": (
        str,
        "sam, asam, esam: on several processes, along whose gradient to perturb: rank (each its own) | global.",
    ),
    "eta": (float, "asam: added to each weight's size."),
    "beta": (float, "esam: probability with which a tensor is perturbed."),
    "gamma": (float, "esam: share of the samples in the second pass."),
    "alpha": (float, "gsam: weight of the part that is removed; looksam: of the part that is reused."),
    "k": (int, "looksam: steps from one second pass to the next; lawa: epochs whose ends are averaged."),
    "sigma": (float, "fsam: share of the gradients' moving mean that is taken off."),
    "lam": (float, "fsam: momentum of that mean."),
    "coefficient": (float, "saf, mesa, squeeze: weight of the trajectory loss; ols: of the soft labels."),
    "temperature": (float, "saf, mesa, squeeze: temperature of the trajectory loss."),
    "start_epoch": (int, "saf, mesa: first epoch, from 0, with the trajectory loss."),
    "lag": (int, "saf: epochs between an output and the one it is compared with."),
    "history": (str, "saf: what it remembers: dense | half | int8 | int6 | int4 | topk | lowrank | mean | auto."),
    "mean_momentum": (float, "saf: momentum of the running mean of outputs that takes the place of the lag."),
    "ema_epochs": (
        float,
        "mesa, ema, sema: horizon of the average in epochs; 1 for sema, a fifth of the run, at least 2, for the others "
        "where not given.",
    ),
    "decay": (float, "mesa, ema, sema: decay of the average, in place of ema_epochs."),
    "fraction": (float, "mesa: share of each batch on which the average is run."),
    "interval": (int, "mesa: the average is run in every interval-th step; the loss is 0 in the others."),
}


def _base(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    return Assembled(given.optimizer)


def _saf(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    names = ("coefficient", "temperature", "lag", "start_epoch", "history")
    options = {name: settings[name] for name in names}
    if settings["mean_momentum"] is not None or settings["history"] == "mean":
        options["lag"] = None  # there is but one slot
    saf = SAF(given.num_samples, given.num_classes, momentum=settings["mean_momentum"], **options)
    saf.to(next(given.model.parameters()).device)
    return Assembled(given.optimizer, saf, lambda logits, y, index, inputs: saf(logits, index), saf.history.nbytes)


def _mesa(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    names = ("coefficient", "temperature", "start_epoch", "fraction", "interval")
    mesa = MESA(given.model, decay=_decay(given, settings), **{name: settings[name] for name in names})
    mesa.attach(given.optimizer)
    return Assembled(given.optimizer, mesa, lambda logits, y, index, inputs: mesa(logits, inputs), _size(mesa.average))


def _ols(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    smoothing = OnlineLabelSmoothing(given.num_classes, coefficient=settings["coefficient"])
    smoothing.to(next(given.model.parameters()).device)
    return Assembled(
        given.optimizer, smoothing, lambda logits, y, index, inputs: smoothing(logits, y), _size(smoothing)
    )


def _squeeze(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    coefficient = check_number("coefficient", settings["coefficient"], least=0)
    temperature = check_number("temperature", settings["temperature"], above=0)

    def penalty(logits: Tensor, y: Tensor, index: Tensor, inputs: Any) -> Tensor:
        return logit_squeezing(logits, coefficient=coefficient, temperature=temperature)

    return Assembled(given.optimizer, penalty=penalty)


def _ema(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    ema = EMA(given.model, decay=_decay(given, settings))
    ema.attach(given.optimizer)
    return Assembled(given.optimizer, average=ema, extra_bytes=_size(ema))


def _sema(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    sema = SwitchEMA(given.model, decay=_decay(given, settings), start_epoch=settings["start_epoch"])
    sema.attach(given.optimizer)
    return Assembled(given.optimizer, average=sema, extra_bytes=_size(sema), at_epoch_end=sema.switch)


def _lawa(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    lawa = LAWA(given.model, k=settings["k"])
    return Assembled(given.optimizer, average=lawa, extra_bytes=_size(lawa), at_epoch_end=lawa.update)


def _decay(given: Ingredients, settings: Mapping[str, Any]) -> float:
    decay: float | None = settings["decay"]
    return ema_decay(settings["ema_epochs"], given.steps_per_epoch) if decay is None else decay


def _size(module: nn.Module) -> int:
    """Bytes of a module's tensors, those of its extra state aside."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", "the plain optimizer", {"smoothing": 0.0}, _base),
        Method("smoothing", "the plain optimizer with label smoothing", {"smoothing": 0.1}, _base),
        *FAMILY,
        Method(
            "saf",
            "against the network's outputs some epochs ago",
            {
                "coefficient": 0.3,
                "temperature": 5.0,
                "lag": 3,
                "start_epoch": 5,
                "history": "dense",
                "mean_momentum": None,
                "smoothing": 0.0,
            },
            _saf,
        ),
        Method(
            "mesa",
            "against the network's moving average",
            {
                "coefficient": 0.8,
                "temperature": 5.0,
                "ema_epochs": None,
                "decay": None,
                "start_epoch": 5,
                "fraction": 1.0,
                "interval": 1,
                "smoothing": 0.0,
            },
            _mesa,
        ),
        Method(
            "ols",
            "online label smoothing: soft labels from what the network said of each class",
            {"coefficient": 0.5, "smoothing": 0.0},
            _ols,
        ),
        Method(
            "squeeze",
            "SAF's loss with a uniform target: label smoothing at a temperature",
            {"coefficient": 0.8, "temperature": 5.0, "smoothing": 0.0},
            _squeeze,
        ),
        Method(
            "ema",
            "the plain optimizer, whose moving average is evaluated",
            {"ema_epochs": None, "decay": None, "smoothing": 0.0},
            _ema,
        ),
        Method(
            "sema",
            "Switch EMA: each epoch goes on from the moving average",
            {"ema_epochs": 1.0, "decay": None, "start_epoch": 0, "smoothing": 0.0},
            _sema,
        ),
        Method(
            "lawa",
            "the plain optimizer, whose last k epochs' ends are averaged",
            {"k": 6, "smoothing": 0.0},
            _lawa,
        ),
    )
}


def get_method(name: str) -> Method:
    """Returns a method of the registry.

    Raises:
        InvalidArgumentError: If there is none of that name; the message names the nearest.
    """
    return METHODS[check_choice("method", name, tuple(METHODS))]


def resolve_settings(method: Method, given: Mapping[str, Any], *, epochs: int) -> dict[str, Any]:
    """Fills in a method's defaults.

    Args:
        method: The method.
        given: Hyperparameters that differ from its defaults.
        epochs: Length of the run, to which the horizon of an average is tied where neither it nor a decay is given.

    Raises:
        InvalidArgumentError: If a name is none of the method's hyperparameters, or two exclude each other.
    """
    for name in given:
        if name not in method.defaults:
            raise InvalidArgumentError(
                f"{method.name} has no hyperparameter {name!r}{nearest(name, tuple(method.defaults))}; "
                f"it has {', '.join(method.defaults)}"
            )
    settings: dict[str, Any] = {**method.defaults, **given}
    if "ema_epochs" in settings:
        if settings["decay"] is not None and given.get("ema_epochs") is None:
            settings["ema_epochs"] = None
        if settings["ema_epochs"] is not None and settings["decay"] is not None:
            raise InvalidArgumentError("ema_epochs and decay exclude each other: give one of them")
        if settings["ema_epochs"] is None and settings["decay"] is None:
            settings["ema_epochs"] = max(EMA_SHARE * epochs, 2.0)  # an epoch may be a single step
    return settings
