"""The rows of the registry that wrap the optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_choice, check_number
from ..optim import (
    ASAM,
    GSAM,
    MSAM,
    S2SAM,
    SAM,
    FriendlySAM,
    LookSAM,
    RhoByLR,
    SharpnessAware,
    normalization_parameters,
)
from .method import Assembled, Ingredients, Method

Settings = Mapping[str, Any]


def _row(
    name: str,
    summary: str,
    defaults: Mapping[str, float | str | None],
    make: Callable[..., SharpnessAware],
    *,
    calls: int | Callable[[int, Settings], int] = 2,
    moved: int = 1,
    whole: int = 0,
) -> Method:
    """A method whose optimizer takes its hyperparameters by name.

    Args:
        name: Its name.
        summary: A line on it.
        defaults: Its hyperparameters but for those of all of the family.
        make: Makes the optimizer.
        calls: How often a step calls the closure.
        moved: Tensors that it has for each perturbed one during a pass.
        whole: Tensors that it has for each parameter during a pass.
    """

    def assemble(given: Ingredients, settings: Settings) -> Assembled:
        norm_layers = check_choice("subset", settings["subset"], ("all", "norm")) == "norm"
        subset = normalization_parameters(given.model) if norm_layers else None
        options = {option: settings[option] for option in defaults}
        optimizer = make(given.optimizer, parameters=subset, **options)
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        size = moved * _bytes(every if subset is None else subset) + whole * _bytes(every)
        return Assembled(optimizer, extra_bytes=size)

    return Method(name, summary, {**defaults, "subset": "all", "smoothing": 0.0}, assemble, closure_calls=calls)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gsam(base: Optimizer, *, rho: float, rho_min: float, alpha: float, **more: Any) -> GSAM:
    """GSAM whose rho falls with the learning rate of the base optimizer, which is now at its highest."""
    check_number("rho", rho, above=0)
    lr = float(base.param_groups[0]["lr"])
    return GSAM(base, rho=RhoByLR(rho, rho_min, lr_max=lr) if rho_min != rho else rho, alpha=alpha, **more)


FAMILY = (
    _row("sam", "two passes a step", {"rho": 0.05, "norm": "rank"}, SAM),
    _row("asam", "SAM relative to each weight's size", {"rho": 0.5, "eta": 0.01, "norm": "rank"}, ASAM),
    _row("gsam", "SAM that closes the gap too", {"rho": 0.04, "rho_min": 0.02, "alpha": 0.01}, _gsam, whole=1),
    _row(
        "looksam",
        "SAM in every k-th step, reused in the others",
        {"rho": 0.05, "k": 5, "alpha": 0.7},
        LookSAM,
        calls=lambda step, settings: 1 if step % settings["k"] else 2,
        whole=2,
    ),
    _row("fsam", "SAM along what is peculiar to a batch", {"rho": 0.2, "sigma": 1.0, "lam": 0.9}, FriendlySAM, moved=3),
    _row("msam", "down the momentum, in one pass", {"rho": 3.0}, MSAM, calls=1),
    _row("s2sam", "up the last step's gradient, in one pass", {"rho": 0.05}, S2SAM, calls=1, moved=2),
)
