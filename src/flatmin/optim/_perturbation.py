"""The perturbation: its length rho, how a direction becomes one, which parameters it moves, and the move itself."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from .._checks import check_module, check_number
from ..errors import InvalidArgumentError
from ._foreach import Scalar, absolute, add_, clones, copy_, length, multiply_, times
from ._joined import Joined

# Parameters, a direction for each, and the directions' norm where it is known; returns s and n of e = rho * s / n.
Scaling = Callable[[list[Tensor], list[Tensor], Scalar | None], tuple[list[Tensor], Scalar]]
Rho = float | Callable[[Optimizer], float]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_NORM_NAME = re.compile(r"Norm(alization)?(\dd)?$")  # nn.RMSNorm, and those of other libraries


@contextmanager
def moved(
    parameters: list[Tensor],
    directions: list[Tensor],
    scaling: Scaling,
    *,
    rho: float,
    eps: float,
    norm: Scalar | None = None,
    check: Callable[[list[Tensor], list[Tensor], list[Tensor]], None] | None = None,
) -> Iterator[list[Tensor]]:
    """Inside, ``parameters`` are moved by ``rho`` along ``directions``; on leaving they are bit-identical to before.

    Args:
        parameters: Those to move.
        directions: A tensor for each. The list is emptied, so that the pass inside can have their memory.
        scaling: Makes ``s`` and ``n`` of the directions; the move is ``rho * s / (n + eps)``.
        rho: Length; negative for the opposite direction.
        eps: Added to ``n``.
        norm: The norm of the directions, where it is known.
        check: Looks at the moved weights, copies of the weights, and ``s``.

    Yields:
        Copies of the weights as they were.
    """
    offsets, divisor = scaling(parameters, directions, norm) if parameters else ([], 0.0)
    weights = clones(parameters)
    try:
        add_(parameters, offsets, alpha=rho / (divisor + eps))
        if check is not None:
            check(parameters, weights, offsets)
        offsets.clear()
        directions.clear()
        forget_computed()
        yield weights
    finally:
        with torch.no_grad():  # a step that is given up comes here by itself
            copy_(parameters, weights)
        forget_computed()


def forget_computed() -> None:
    """Forgets what torch keeps of weights as they were, in a context around the step.

    Such as the casts of ``torch.autocast``, and the tensors of ``torch.nn.utils.parametrize.cached()``.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def unit(parameters: list[Tensor], directions: list[Tensor], norm: Scalar | None = None) -> tuple[list[Tensor], Scalar]:
    """The direction as it is: one norm over all parameters together."""
    return directions, length(directions) if norm is None else norm


@dataclass(frozen=True)
class Elementwise:
    """Moves each weight in proportion to its own square, so that rescaling a layer changes nothing.

    ASAM's::

        e = rho * T^2 d / |T d|,   T = |w| + eta for tensors of two dimensions and more, 1 for the others

    ASAM's own code chooses by name: ``*weight*`` has T, biases have not. An optimizer knows no names, and biases and
    the weights of normalisation layers are what has one dimension. Costs two tensors of the weights' size for a moment.

    Args:
        eta: Added to the absolute weights, >= 0; default 0.01.

    Raises:
        InvalidArgumentError: (a ValueError) if ``eta`` is negative.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1)
        >>> optimizer = flatmin.GSAM(base, rho=0.5, scaling=flatmin.optim.Elementwise(0.01))
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        check_number("eta", self.eta, least=0)

    def __call__(
        self, parameters: list[Tensor], directions: list[Tensor], norm: Scalar | None = None
    ) -> tuple[list[Tensor], Scalar]:
        """Returns ``T^2 d`` and ``|T d|``."""
        wide = [index for index, parameter in enumerate(parameters) if parameter.ndim >= 2]
        factors = absolute([parameters[index] for index in wide], self.eta)
        some = times([directions[index] for index in wide], factors)
        offsets = list(directions)
        for index, tensor in zip(wide, some, strict=True):
            offsets[index] = tensor
        norm = length(offsets)
        multiply_(some, factors)
        return offsets, norm


def normalization_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the scales and shifts of a model's normalisation layers: SAM-ON with ``parameters=``.

    *Normalization Layers Are All That Sharpness-Aware Minimization Needs*, Mueller et al., NeurIPS 2023,
    arXiv 2306.04226. It asks for a larger rho than SAM on all parameters, 0.5 to 1.

    Args:
        model: The network. Layers are torch's own, those derived from them, and any whose class has a name that ends in
            ``Norm``, ``Norm1d``, ``Norm2d``, ``Norm3d`` or ``Normalization``.

    Raises:
        InvalidArgumentError: (a ValueError) if there are none.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sam = flatmin.SAM(base, rho=0.5, parameters=flatmin.optim.normalization_parameters(model))
    """
    found: dict[nn.Parameter, None] = {}
    for module in check_module("model", model).modules():
        if isinstance(module, _NORMS) or _NORM_NAME.search(type(module).__name__):
            found.update(dict.fromkeys(module.parameters(recurse=False)))
    if not found:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no normalisation layer with parameters; give parameters= those that you mean"
        )
    return list(found)


def check_subset(parameters: Iterable[Tensor] | None, base: Optimizer) -> set[Tensor] | None:
    """Returns the parameters to perturb as a set, None for all, if all of them are the base optimizer's."""
    if parameters is None:
        return None
    if isinstance(parameters, (Tensor, str)):
        raise InvalidArgumentError(f"parameters must be several tensors, got {type(parameters).__name__}; put it in []")
    try:
        wanted = list(parameters)
    except TypeError:
        raise InvalidArgumentError(f"parameters must be several tensors, got {type(parameters).__name__}") from None
    known = {parameter for group in base.param_groups for parameter in group["params"]}
    for index, parameter in enumerate(wanted):
        if not isinstance(parameter, Tensor):
            raise InvalidArgumentError(
                f"parameters must be tensors, got {type(parameter).__name__} at index {index}; "
                "of model.named_parameters() take the second of each pair"
            )
        if parameter not in known:
            raise InvalidArgumentError(
                f"parameters has a tensor of shape {tuple(parameter.shape)} at index {index} that base_optimizer does "
                "not have; give it those that the base optimizer was made with"
            )
    if not wanted:
        raise InvalidArgumentError("parameters is empty; leave it out to perturb all")
    return set(wanted)


def check_scaling(scaling: Scaling | None) -> Scaling:
    """Returns ``scaling``, `unit` where it is None."""
    if scaling is not None and (isinstance(scaling, type) or not callable(scaling)):
        raise InvalidArgumentError(f"scaling must be one such as flatmin.optim.Elementwise(0.01), got {scaling!r}")
    return unit if scaling is None else scaling


def check_rho(rho: Rho) -> Rho:
    """Returns ``rho`` if it is a length > 0 or a function."""
    if callable(rho) and not isinstance(rho, type):
        return rho
    hint = "; or give a function of the optimizer to a number"
    return check_number("rho", rho, above=0, hint=hint)  # type: ignore[arg-type]  # a class is no number


def rho_of(rho: Rho, optimizer: Optimizer) -> float:
    """The rho of this step; refuses one in a parameter group, where other libraries' SAM has it, unless the base does.

    Raises:
        InvalidArgumentError: If there is one, or the function's value is none.
    """
    each = optimizer.optimizers if isinstance(optimizer, Joined) else [optimizer]
    if any("rho" not in one.defaults and any("rho" in group for group in one.param_groups) for one in each):
        raise InvalidArgumentError(
            "a parameter group has a rho, which would have no effect: rho is one length over all groups, a number or "
            "a function of the base optimizer that is called in each step, such as flatmin.optim.RhoByLR"
        )
    return check_number("rho", rho(optimizer), least=0, hint=" from its schedule") if callable(rho) else rho
