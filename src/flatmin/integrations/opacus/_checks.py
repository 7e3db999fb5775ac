"""What DP-SAT cannot be attached to; each is refused in a sentence."""

from typing import Any

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.optim import Optimizer

from ..._privacy import is_private_optimizer
from ...errors import InvalidArgumentError
from ...optim._wrapper import Wrapper

ORDER = (
    "module, optimizer, loader = engine.make_private(module=..., optimizer=..., data_loader=..., ...), and then "
    "DPSAT(module=module, optimizer=optimizer)"
)


def check_optimizer(optimizer: Any) -> Optimizer:
    """Returns the optimizer inside of Opacus', which makes the step."""
    name = type(optimizer).__name__
    if not is_private_optimizer(optimizer):
        raise InvalidArgumentError(f"optimizer ({name}) is none of Opacus', and trains without privacy: {ORDER}")
    base = optimizer.original_optimizer
    if isinstance(base, Wrapper):
        kind = type(base).__name__
        raise InvalidArgumentError(
            f"optimizer ({name}) is around {kind}, whose passes would be without privacy: give make_private the plain "
            f"optimizer that {kind} wraps, and DPSAT what it returns"
        )
    if not isinstance(base, Optimizer) or not hasattr(base, "_optimizer_step_pre_hooks"):
        raise InvalidArgumentError(
            f"optimizer ({name}) is around {type(base).__name__}, on which torch's hooks do not work: {ORDER}"
        )
    return base


def check_module(module: Any, base: Optimizer) -> nn.Module:
    """Returns the network that Opacus has prepared, out of its wrappers."""
    network = getattr(module, "_module", module)  # of GradSampleModule, and of GradSampleHooks with wrap_model=False
    if not isinstance(network, nn.Module):
        raise InvalidArgumentError(f"module must be what make_private returned, got {type(module).__name__}: {ORDER}")
    parameters = set(network.parameters())
    if not all(hasattr(parameter, "grad_sample") for parameter in parameters if parameter.requires_grad):
        raise InvalidArgumentError(f"module ({type(module).__name__}) was not prepared by Opacus: {ORDER}")
    own = [parameter for group in base.param_groups for parameter in group["params"]]
    if not all(parameter in parameters for parameter in own):
        raise InvalidArgumentError(
            f"module ({type(module).__name__}) lacks parameters of optimizer, so that its passes are not those of the "
            f"step: {ORDER}"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in own):
        raise InvalidArgumentError(
            "DPSAT was not tried with sharded parameters (DTensor, grad_sample_mode='ghost_fsdp'): take "
            "DifferentiallyPrivateDistributedDataParallel"
        )
    inner: nn.Module = network.module if isinstance(network, DifferentiallyPrivateDistributedDataParallel) else network
    return inner
