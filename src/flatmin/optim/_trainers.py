"""Says what goes wrong where a trainer calls ``step`` with a closure in which it does more than a pass."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard
from weakref import WeakSet

from .._checks import check_function
from ..errors import FlatminWarning, InvalidArgumentError

CALLBACK = "add the callback flatmin.integrations.lightning.SharpnessAware() to the Trainer"
DEPTH = 20  # frames between accelerate's step and this: torch's wrappers, a scheduler's, the scaler's
_warned: "WeakSet[Any]" = WeakSet()  # optimizers


def check_closure(optimizer: Any, closure: Callable[..., Any]) -> None:
    """Refuses a closure of a trainer's with which the step would be wrong, and warns once where only its logs are.

    Lightning clips and logs within the closure, so that each pass does, and accumulates outside of it. Accelerate
    calls no closure for micro-batches between two steps, and scales the loss by a scaler that the optimizer was not
    given.

    Args:
        optimizer: Whose step it is, one of flatmin's.
        closure: Any closure.

    Raises:
        InvalidArgumentError: If the step would be wrong.
    """
    check_function("closure", closure, "that computes the loss", otherwise=f", {optimizer._closure}")
    _check_prepared(optimizer)
    if not _is_of_lightning(closure):
        return
    name, module = type(optimizer).__name__, closure.args[0]
    if optimizer.per_sample_closure:
        raise InvalidArgumentError(
            f"{name} needs the loss of each sample, and Lightning's closures take no samples: use flatmin.SAM, or to "
            "pay less flatmin.LookSAM or when=flatmin.optim.Every(2)"
        )
    if not module.automatic_optimization:
        if getattr(closure.args[2], "__name__", "") == "do_nothing_closure":
            raise InvalidArgumentError(
                f"{name} has to make the backward pass where it chooses: in manual optimization call "
                "optimizer.step(closure), where the closure calls optimizer.zero_grad() and manual_backward(loss) and "
                "returns the loss"
            )
        return
    trainer = module.trainer
    if trainer.accumulate_grad_batches > 1:
        raise InvalidArgumentError(
            f"{name} sees only the last of Lightning's accumulate_grad_batches={trainer.accumulate_grad_batches}: "
            f"{CALLBACK}"
        )
    if optimizer.max_passes == 1:
        return
    if trainer.gradient_clip_val and (_uses_first(optimizer) or trainer.gradient_clip_algorithm == "value"):
        raise InvalidArgumentError(
            f"Lightning's gradient_clip_val clips the first gradient of {name} too, which changes the step: {CALLBACK}"
            f", or make it {name}(..., max_norm={trainer.gradient_clip_val})"
        )
    if optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"Lightning's logs, metrics and hooks count both passes of each {name} step: {CALLBACK}, which makes them "
            "count one (warned once)",
            FlatminWarning,
            stacklevel=6,  # this, _make_passes, step, torch's two wrappers
        )


def check_loss(optimizer: Any, closure: Callable[..., Any], loss: Any) -> None:
    """Refuses a batch that Lightning's ``training_step`` skips by returning None, in whichever pass.

    Raises:
        InvalidArgumentError: If it did, in automatic optimization.
    """
    if loss is None and _is_of_lightning(closure) and closure.args[0].automatic_optimization:
        raise InvalidArgumentError(
            f"training_step returned None, which skips the batch, and {type(optimizer).__name__} has a step under way: "
            f"{CALLBACK}, which leaves the step out"
        )


def _is_of_lightning(closure: Callable[..., Any]) -> TypeGuard["partial[Any]"]:
    return isinstance(closure, partial) and len(closure.args) == 3 and _is_lightning(closure.func)


def _check_prepared(optimizer: Any) -> None:
    """Refuses ``step(closure)`` of what accelerate's ``prepare`` returned, under accumulation or with its scaler."""
    accelerate: Any = sys.modules.get("accelerate.optimizer")
    prepared: Any = getattr(accelerate, "AcceleratedOptimizer", None)
    frame = None if prepared is None else sys._getframe(1)
    for _ in range(DEPTH):
        if frame is None or frame.f_code is prepared.step.__code__:
            break
        frame = frame.f_back
    else:
        return
    caller = None if frame is None else frame.f_locals.get("self")
    if caller is None or caller.optimizer is not optimizer:
        return
    name, count = type(optimizer).__name__, caller.gradient_state.num_steps
    what = f"gradient_accumulation_steps={count}, of which the closure sees the last micro-batch alone"
    if count == 1:
        if caller.scaler is None or not caller.scaler.is_enabled():
            return
        what = "a scaler, which takes no closures"
    raise InvalidArgumentError(
        f"{name}.step(closure) was called by accelerate's optimizer with {what}: make the step by "
        "flatmin.integrations.accelerate.sharpness_aware(accelerator, model, optimizer, loss=...), or, with a closure "
        f"that goes over all micro-batches, by optimizer.optimizer.step(closure) with {name}(..., "
        "scaler=accelerator.scaler)"
    )


def _uses_first(optimizer: Any) -> bool:
    return optimizer._uses_first or optimizer._when.before(optimizer._steps) is None


def _is_lightning(function: object) -> bool:
    kinds = type(getattr(function, "__self__", None)).__mro__
    return any(kind.__module__.split(".")[0] in ("lightning", "pytorch_lightning") for kind in kinds)
