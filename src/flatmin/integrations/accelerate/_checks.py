"""What the step cannot be right with; each is refused in a sentence."""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ...errors import InvalidArgumentError
from ...losses import SAF
from ...optim import SharpnessAware as Optimizer

# In all others a gradient is not all of it where it is looked at, or somebody else makes the step.
WHOLE = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU"}


def check_accelerator(accelerator: object) -> Accelerator:
    """Returns ``accelerator``."""
    if not isinstance(accelerator, Accelerator):
        raise InvalidArgumentError(
            f"accelerator must be accelerate.Accelerator, got {type(accelerator).__name__}: "
            "sharpness_aware(accelerator, model, optimizer, loss=...)"
        )
    kind = DistributedType(accelerator.distributed_type).value
    if kind not in WHOLE:
        raise InvalidArgumentError(
            f"sharpness_aware is for one process and for DistributedDataParallel, got {kind}, in which a gradient is "
            "not all of it where it is looked at"
        )
    return accelerator


def check_model(model: Any, accelerator: Any) -> None:
    """Refuses a model that is not what ``prepare`` returned, around the one that it was given perhaps."""
    inside = list(model.modules()) if isinstance(model, nn.Module) else []
    known = any(module is each for module in inside for each in accelerator._models)
    if not (known and getattr(model, "_is_accelerate_prepared", False)):
        raise InvalidArgumentError(
            f"model ({type(model).__name__}) is not what accelerator.prepare returned: "
            "model, optimizer, loader = accelerator.prepare(model, optimizer, loader), and then sharpness_aware"
        )


def check_optimizer(optimizer: Any, accelerator: Any) -> Optimizer:
    """Returns flatmin's optimizer that ``prepare`` has wrapped."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, AcceleratedOptimizer) or not any(optimizer is o for o in accelerator._optimizers):
        raise InvalidArgumentError(
            f"optimizer ({name}) is not what accelerator.prepare returned: "
            "model, optimizer, loader = accelerator.prepare(model, flatmin.SAM(base), loader), and then sharpness_aware"
        )
    plain: Any = optimizer.optimizer
    name = type(plain).__name__
    if not isinstance(plain, Optimizer):
        raise InvalidArgumentError(
            f"optimizer is a prepared {name}, and sharpness_aware is for one of flatmin's: "
            f"accelerator.prepare(flatmin.SAM({name}(...)))"
        )
    if plain.per_sample_closure:
        raise InvalidArgumentError(
            f"{name} needs the loss of each sample, of which it chooses some, and micro-batches cannot be given to it: "
            "use flatmin.SAM, or to pay less flatmin.LookSAM or when=flatmin.optim.Every(2)"
        )
    if plain.scaler.is_enabled() and plain.scaler is not accelerator.scaler:
        raise InvalidArgumentError(
            f"{name} was given a scaler that is not the accelerator's: leave scaler= out, accelerator.scaler is taken"
        )
    return plain


def check_without_saf(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuses ``module`` if it is SAF, for an optimizer that makes two passes."""
    if isinstance(module, SAF):
        name = type(optimizer).__name__
        raise InvalidArgumentError(
            f"SAF is to save the second pass that {name} makes, and has no past in it: use SAF or {name}, not both"
        )


def check_no_backward(optimizer: Optimizer) -> None:
    """Refuses a loss function that has left gradients, which were cleared before it."""
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        raise InvalidArgumentError(
            "loss called backward() itself, which the function of sharpness_aware does: let it compute and return the "
            "loss, and nothing else"
        )


def check_loss(loss: Any) -> Tensor:
    """Returns what the loss function returned for a micro-batch."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidArgumentError(
            f"loss must return the loss of the micro-batch, a tensor of one element with gradient, got {what}; "
            "of a model of transformers: loss=lambda batch: model(**batch).loss"
        )
    if not loss.requires_grad:
        raise InvalidArgumentError(
            "what loss returned needs no gradient: let it call the prepared model, without torch.no_grad() or detach()"
        )
    return loss
