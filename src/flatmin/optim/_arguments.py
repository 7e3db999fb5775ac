"""Which optimizers can be wrapped, and which parameters are perturbed."""

import inspect
import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ..errors import InvalidArgumentError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_NORM_NAME = re.compile(r"Norm(alization)?(\dd)?$")  # nn.RMSNorm, and those of other libraries


def check_base(base: object) -> None:
    """Checks that ``base`` is a torch optimizer that can step without a closure."""
    if isinstance(base, type):
        raise InvalidArgumentError(
            f"base_optimizer must be an instance, got the class {base.__name__}; "
            f"write {base.__name__}(model.parameters(), lr=...)"
        )
    if not isinstance(base, Optimizer):
        raise InvalidArgumentError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    try:
        inspect.signature(type(base).step).bind(base)
    except TypeError:
        raise InvalidArgumentError(
            f"base_optimizer must step without a closure of its own, which {type(base).__name__} cannot"
        ) from None
    if any(group.get("maximize") for group in base.param_groups):
        raise InvalidArgumentError(
            "base_optimizer has maximize=True, and the weights would be moved to where that is easiest, not worst; "
            "minimize the negative instead"
        )


def normalization_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and shifts of a model's normalisation layers, to give as ``parameters=``: SAM-ON.

    *Normalization Layers Are All That Sharpness-Aware Minimization Needs*, Mueller et al., NeurIPS 2023,
    arXiv 2306.04226. It asks for a larger rho than SAM on all parameters, .5 to 1.

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
    for module in model.modules():
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
    for number, parameter in enumerate(wanted):
        if not isinstance(parameter, Tensor):
            raise InvalidArgumentError(
                f"parameters must be tensors, got {type(parameter).__name__} at place {number}; "
                "of model.named_parameters() take the second of each pair"
            )
        if parameter not in known:
            raise InvalidArgumentError(
                f"parameters has a tensor of shape {tuple(parameter.shape)} at place {number} that base_optimizer does "
                "not have; give it those that the base optimizer was made with"
            )
    if not wanted:
        raise InvalidArgumentError("parameters is empty; leave it out to perturb all")
    return set(wanted)
