"""The registry: each training method by name, and how it is put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_choice, nearest
from ..errors import InvalidArgumentError
from ..losses import MESA, SAF, ema_decay
from ..optim import SAM, SharpnessAware

# MESA's average looks back over this share of the run where nothing else is said: 12 of 60 epochs. The paper's .9998 is
# 5,000 steps, or 18 % of its 90 epochs of ImageNet.
EMA_SHARE = 0.2

HYPERPARAMETERS: dict[str, tuple[type, str]] = {
    "smoothing": (
        float,
        "Label smoothing of the criterion (every method; 0.1 for the method smoothing, else 0).",
    ),
    "rho": (float, "sam: length of the perturbation."),
    "norm": (str, "sam: on several processes, along whose gradient to perturb: rank (each its own) | global."),
    "coefficient": (float, "saf, mesa: weight of the trajectory loss."),
    "temperature": (float, "saf, mesa: temperature of the trajectory loss."),
    "start_epoch": (int, "saf, mesa: first epoch, from 0, with the trajectory loss."),
    "lag": (int, "saf: epochs between an output and the one it is compared with."),
    "history": (str, "saf: what it remembers: dense | half | int8 | int6 | int4 | topk | lowrank | mean | auto."),
    "mean_momentum": (float, "saf: momentum of the running mean of outputs that takes the place of the lag."),
    "ema_epochs": (float, "mesa: horizon of the average in epochs; a fifth of the run, at least 2, where not given."),
    "decay": (float, "mesa: decay of the average, in place of ema_epochs."),
    "fraction": (float, "mesa: share of each batch on which the average is run."),
    "interval": (int, "mesa: the average is run in every interval-th step; the loss is 0 in the others."),
}


@dataclass(frozen=True)
class Ingredients:
    """What a method is put together from."""

    model: nn.Module
    optimizer: Optimizer
    num_samples: int
    num_classes: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Assembled:
    """A method, ready for the loop: what makes the step, and what is added to the criterion.

    Attributes:
        optimizer: Called as ``optimizer.step(closure)``.
        trajectory: The module with ``set_epoch`` and state, or None.
        penalty: Called as ``penalty(logits, index, inputs)`` in the closure, or None.
        extra_bytes: What the method keeps in memory beyond the base optimizer, in bytes.
    """

    optimizer: Optimizer
    trajectory: SAF | MESA | None = None
    penalty: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    extra_bytes: int = 0


@dataclass(frozen=True)
class Method:
    """A way to train: its name, its hyperparameters with their defaults, and how to put it together.

    Attributes:
        closure_calls: How often a step calls the closure.
    """

    name: str
    summary: str
    defaults: Mapping[str, float | str | None]
    assemble: Callable[[Ingredients, Mapping[str, Any]], Assembled]
    closure_calls: int = 1


def _base(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    return Assembled(given.optimizer)


def _sam(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    optimizer: SharpnessAware = SAM(given.optimizer, rho=settings["rho"], norm=settings["norm"])
    weights = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    return Assembled(optimizer, extra_bytes=weights)


def _saf(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    names = ("coefficient", "temperature", "lag", "start_epoch", "history")
    options = {name: settings[name] for name in names}
    if settings["mean_momentum"] is not None or settings["history"] == "mean":
        options["lag"] = None  # there is but one slot
    saf = SAF(given.num_samples, given.num_classes, momentum=settings["mean_momentum"], **options)
    saf.to(next(given.model.parameters()).device)
    return Assembled(given.optimizer, saf, lambda logits, index, inputs: saf(logits, index), saf.history.nbytes)


def _mesa(given: Ingredients, settings: Mapping[str, Any]) -> Assembled:
    decay = settings["decay"]
    if decay is None:
        decay = ema_decay(settings["ema_epochs"], given.steps_per_epoch)
    names = ("coefficient", "temperature", "start_epoch", "fraction", "interval")
    mesa = MESA(given.model, decay=decay, **{name: settings[name] for name in names})
    mesa.attach(given.optimizer)
    average = sum(tensor.nbytes for tensor in mesa.average.state_dict().values())
    return Assembled(given.optimizer, mesa, lambda logits, index, inputs: mesa(logits, inputs), average)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", "the plain optimizer", {"smoothing": 0.0}, _base),
        Method("smoothing", "the plain optimizer with label smoothing", {"smoothing": 0.1}, _base),
        Method("sam", "two passes a step", {"rho": 0.05, "norm": "rank", "smoothing": 0.0}, _sam, closure_calls=2),
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
        epochs: Length of the run, to which MESA's horizon is tied where neither it nor a decay is given.

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
        if settings["ema_epochs"] is not None and settings["decay"] is not None:
            raise InvalidArgumentError("ema_epochs and decay exclude each other: give one of them")
        if settings["ema_epochs"] is None and settings["decay"] is None:
            settings["ema_epochs"] = max(EMA_SHARE * epochs, 2.0)  # an epoch may be a single step
    return settings
