"""How a direction becomes a perturbation of length rho, and rho itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_number
from ..errors import InvalidArgumentError
from ._foreach import absolute, global_norm, multiply_, times

# Parameters, a direction for each, and the directions' norm where it is known; returns s and n of e = rho * s / n.
Scaling = Callable[[list[Tensor], list[Tensor], float | None], tuple[list[Tensor], float]]
Rho = float | Callable[[Optimizer], float]


def unit(parameters: list[Tensor], directions: list[Tensor], norm: float | None = None) -> tuple[list[Tensor], float]:
    """The direction as it is: one norm over all parameters together."""
    return directions, float(global_norm(directions)) if norm is None else norm


@dataclass(frozen=True)
class Elementwise:
    """Each weight is moved in proportion to its own square, so that rescaling a layer changes nothing.

    ASAM's::

        e = rho * T^2 d / |T d|,   T = |w| + eta for tensors of two dimensions and more, 1 for the others

    ASAM's own code chooses by name: ``*weight*`` has T, biases have not. An optimizer knows no names, and biases and
    the weights of normalisation layers are what has one dimension. Costs two tensors of the weights' size for a moment.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        check_number("eta", self.eta, least=0)

    def __call__(
        self, parameters: list[Tensor], directions: list[Tensor], norm: float | None = None
    ) -> tuple[list[Tensor], float]:
        """Returns ``T^2 d`` and ``|T d|``."""
        wide = [number for number, parameter in enumerate(parameters) if parameter.ndim >= 2]
        factors = absolute([parameters[number] for number in wide], self.eta)
        some = times([directions[number] for number in wide], factors)
        moved = list(directions)
        for number, tensor in zip(wide, some, strict=True):
            moved[number] = tensor
        length = float(global_norm(moved))
        multiply_(some, factors)
        return moved, length


@dataclass(frozen=True)
class RhoByLR:
    """A rho that follows the learning rate between two values of either.

    GSAM's::

        rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)

    Args:
        rho_max: At ``lr_max``.
        rho_min: At ``lr_min``; 0 for a plain step of the base optimizer there.
        lr_max: The highest learning rate of the run, of the first parameter group.
        lr_min: The lowest.

    Raises:
        InvalidArgumentError: (a ValueError) if one is negative, or ``lr_max`` is not above ``lr_min``.

    Example:
        >>> import torch
        >>> base = torch.optim.SGD([torch.zeros(1)], lr=0.05)
        >>> round(RhoByLR(0.04, 0.02, lr_max=0.1)(base), 6)
        0.03
    """

    rho_max: float
    rho_min: float
    lr_max: float = field(kw_only=True)
    lr_min: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("rho_max", "rho_min", "lr_min"):
            check_number(name, getattr(self, name), least=0)
        check_number("lr_max", self.lr_max, above=self.lr_min)

    def __call__(self, optimizer: Optimizer) -> float:
        """The rho of a step of ``optimizer``; none below 0."""
        share = (float(optimizer.param_groups[0]["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
        return max(self.rho_min + (self.rho_max - self.rho_min) * share, 0.0)


def check_scaling(scaling: Scaling | None) -> Scaling:
    """Returns ``scaling``, `unit` where it is None."""
    if scaling is not None and (isinstance(scaling, type) or not callable(scaling)):
        raise InvalidArgumentError(f"scaling must be one such as flatmin.optim.Elementwise(0.01), got {scaling!r}")
    return unit if scaling is None else scaling


def check_rho(rho: Rho) -> Rho:
    """Returns ``rho`` if it is a length > 0 or a function."""
    hint = "; or give a function of the optimizer to a number"
    if callable(rho) and not isinstance(rho, type):
        return rho
    return check_number("rho", rho, above=0, hint=hint)  # type: ignore[arg-type]  # a class is no number


def rho_of(rho: Rho, optimizer: Optimizer) -> float:
    """The rho of this step."""
    return check_number("rho", rho(optimizer), least=0, hint=" from its schedule") if callable(rho) else rho
