"""The rows of the registry that wrap the optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..._checks import check_choice, check_number, nearest
from ...errors import InvalidArgumentError
from ...optim import (
    ASAM,
    ESAM,
    GSAM,
    MSAM,
    S2SAM,
    SAM,
    Adaptive,
    Every,
    FriendlySAM,
    Late,
    LookSAM,
    RhoByLR,
    Schedule,
    SharpnessAware,
    Sometimes,
    normalization_parameters,
)
from .method import Assembled, Ingredients, Method

Settings = Mapping[str, Any]


def parse_when(text: str | None, steps: int) -> Schedule | None:
    """Reads which steps pay for a second pass.

    Args:
        text: ``always``, ``every:K``, ``late:SHARE``, ``sometimes:PROBABILITY``, ``adaptive``; None for the method's
            own choice.
        steps: Steps of the run.

    Raises:
        InvalidArgumentError: If it is none of them, or its number is out of its bounds.
    """
    if text is None:
        return None
    if text == "always":
        return Every(1)
    kind, _, number = text.partition(":")
    try:
        if kind == "every":
            return Every(int(number))
        if kind == "late":
            return Late(float(number), steps)
        if kind == "sometimes":
            return Sometimes(float(number))
        if text == "adaptive":
            return Adaptive(steps)
    except InvalidArgumentError:
        raise
    except ValueError:
        raise InvalidArgumentError(f"when={text!r}: {number!r} is no number; write such as {_EXAMPLES}") from None
    kinds = ("always", "every", "late", "sometimes", "adaptive")
    raise InvalidArgumentError(f"unknown when {text!r}{nearest(kind, kinds)}; there are {_EXAMPLES}")


_EXAMPLES = "always, every:5, late:0.2, sometimes:0.5, adaptive"


def _pays(own: Callable[[Settings], str]) -> Callable[[int, Settings, int], bool | None]:
    """Whether a step pays, by its ``when``, or else ``own``."""

    def pays(step: int, settings: Settings, steps: int) -> bool | None:
        when = parse_when(settings["when"] or own(settings), steps)
        return True if when is None else when.before(step)

    return pays


def _row(
    name: str,
    summary: str,
    defaults: Mapping[str, float | str | None],
    make: Callable[..., SharpnessAware],
    *,
    passes: int = 2,
    own: Callable[[Settings], str] = lambda settings: "always",
    moved: int = 1,
    whole: int = 0,
    subset: str = "all",
    when: str | None = "always",
) -> Method:
    """A method whose optimizer takes its hyperparameters by name.

    Args:
        name: Its name.
        summary: A line on it.
        defaults: Its hyperparameters but for those of all of the family.
        make: Makes the optimizer.
        passes: How often a step that pays calls the closure; 1 for a method of one pass, which has no ``when``.
        own: Which steps pay where its ``when`` is None.
        moved: Tensors that it has for each perturbed one during a pass.
        whole: Tensors that it has for each parameter during a pass.
        subset: Which parameters it perturbs by default.
        when: Which steps pay by default.
    """

    def assemble(given: Ingredients, settings: Settings) -> Assembled:
        norm_layers = check_choice("subset", settings["subset"], ("all", "norm")) == "norm"
        parameters = normalization_parameters(given.model) if norm_layers else None
        options = {option: settings[option] for option in defaults}
        if passes > 1:
            options["when"] = parse_when(settings["when"], given.epochs * given.steps_per_epoch)
        optimizer = make(given.optimizer, parameters=parameters, scaler=given.scaler, **options)
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        size = moved * _bytes(every if parameters is None else parameters) + whole * _bytes(every)
        return Assembled(optimizer, extra_bytes=size, chooses=optimizer.per_sample_closure)

    shared: dict[str, float | str | None] = {"subset": subset, "smoothing": 0.0}
    if passes == 1:
        return Method(name, summary, {**defaults, **shared}, assemble)
    return Method(name, summary, {**defaults, **shared, "when": when}, assemble, passes, _pays(own))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gsam(base: Optimizer, *, rho: float, rho_min: float, alpha: float, **more: Any) -> GSAM:
    """GSAM whose rho falls with the learning rate of the base optimizer, which is now at its highest."""
    check_number("rho", rho, above=0)
    lr = float(base.param_groups[0]["lr"])
    return GSAM(base, rho=RhoByLR(rho, rho_min, lr_max=lr) if rho_min != rho else rho, alpha=alpha, **more)


_SAM: Mapping[str, float | str | None] = {"rho": 0.05, "norm": "rank"}

FAMILY = (
    _row("sam", "two passes a step", _SAM, SAM),
    _row("samon", "SAM on normalisation layers only", {**_SAM, "rho": 0.5}, SAM, subset="norm"),
    _row("latesam", "SAM in the last part of the run", _SAM, SAM, when="late:0.2"),
    _row("aesam", "SAM where the gradient is large beside its past", _SAM, SAM, when="adaptive"),
    _row("asam", "SAM relative to each weight's size", {"rho": 0.5, "eta": 0.01, "norm": "rank"}, ASAM),
    _row(
        "esam",
        "SAM on random tensors and half of the samples",
        {"rho": 0.05, "beta": 0.6, "gamma": 0.5, "norm": "rank"},
        ESAM,
        passes=3,
    ),
    _row("gsam", "SAM that closes the gap too", {"rho": 0.04, "rho_min": 0.02, "alpha": 0.01}, _gsam, whole=1),
    _row(
        "looksam",
        "SAM in every k-th step, reused in the others",
        {"rho": 0.05, "k": 5, "alpha": 0.7},
        LookSAM,
        own=lambda settings: f"every:{settings['k']}",
        whole=2,
        when=None,
    ),
    _row("fsam", "SAM along what is peculiar to a batch", {"rho": 0.2, "sigma": 1.0, "lam": 0.9}, FriendlySAM, moved=3),
    _row("msam", "down the momentum, in one pass", {"rho": 3.0}, MSAM, passes=1),
    _row("s2sam", "up the last step's gradient, in one pass", {"rho": 0.05}, S2SAM, passes=1, moved=2),
)
