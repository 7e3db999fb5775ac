"""Says where transformers' Trainer adds up a penalty over micro-batches without dividing it."""

import sys
import warnings
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .._warn import depth_in_package
from ..errors import FlatminWarning

DEPTH = 24  # frames between the Trainer's and this
_looked_at: "weakref.WeakSet[Any]" = weakref.WeakSet()  # Trainers


def watched(penalty: Tensor, name: str) -> Tensor:
    """Returns ``penalty``; warns once a Trainer if its gradient is that of a whole step, in one micro-batch of several.

    The Trainer divides the sum that ``compute_loss`` returns only where it does not take the model's loss for one that
    ``num_items_in_batch`` has divided already. Which factor a penalty gets, whoever multiplies it, is in its gradient.

    Args:
        penalty: What is to be added to the loss of a micro-batch, a mean over it.
        name: Whose it is.
    """
    if "transformers.trainer" in sys.modules and penalty.requires_grad and not torch.compiler.is_compiling():
        _watch(penalty, name)
    return penalty


@_disable_dynamo
def _watch(penalty: Tensor, name: str) -> None:
    trainer = _trainer()
    if trainer is None or trainer in _looked_at or _adds_by_itself(trainer):
        return
    count = trainer.current_gradient_accumulation_steps
    if count == 1:
        return
    _looked_at.add(trainer)
    scaler = trainer.accelerator.scaler
    kind = type(trainer).__name__

    def look(gradient: Tensor) -> None:
        scale = 1.0 if scaler is None or not scaler.is_enabled() else scaler.get_scale()
        if abs(float(gradient) / scale - 1) > 1e-5:
            return
        warnings.warn(
            f"{kind} does not divide what its compute_loss adds to the model's loss, so that {name} counts "
            f"gradient_accumulation_steps={count} times: divide it by self.current_gradient_accumulation_steps there, "
            "or have SAF and MESA added by the mixin flatmin.integrations.transformers.Sharpness, penalty=... (warned "
            "once)",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )

    penalty.register_hook(look)  # type: ignore[no-untyped-call]  # torch leaves it without types


def _adds_by_itself(trainer: Any) -> bool:
    """Whether it has flatmin's mixin with a penalty, which is weighted there."""
    mixed_in = any(kind.__module__.startswith("flatmin.integrations.transformers.") for kind in type(trainer).__mro__)
    return mixed_in and trainer.penalty is not None


def _trainer() -> Any:
    """The Trainer whose training step this is in; None elsewhere."""
    step = sys.modules["transformers.trainer"].Trainer.training_step.__code__
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEPTH):
        if frame is None or frame.f_code is step:
            break
        frame = frame.f_back
    else:
        return None
    return None if frame is None else frame.f_locals.get("self")
