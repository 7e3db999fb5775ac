"""Says what goes wrong where a trainer calls ``step`` with a closure in which it does more than a pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import InvalidArgumentError

CALLBACK = "add the callback flatmin.integrations.lightning.SharpnessAware() to the Trainer"


def check_closure(
    closure: Callable[..., Any], *, name: str, passes: int, uses_first: Callable[[], bool], per_sample: bool
) -> str | None:
    """Looks at a closure that Lightning may have made; it clips and logs within, in each pass.

    Args:
        closure: Any closure.
        name: The optimizer's class.
        passes: How many passes its steps may have.
        uses_first: Whether the length of the first gradient matters.
        per_sample: Whether it takes a `PerSampleClosure`.

    Returns:
        What is to be warned of; None for closures of others.

    Raises:
        InvalidArgumentError: If the step would be wrong.
    """
    if not (isinstance(closure, partial) and len(closure.args) == 3 and _is_lightning(closure.func)):
        return None
    module, inner = closure.args[0], closure.args[2]
    if per_sample:
        raise InvalidArgumentError(
            f"{name} needs the loss of each sample, and Lightning's closures take no samples: use flatmin.SAM, or to "
            "pay less flatmin.LookSAM or when=flatmin.optim.Every(2)"
        )
    if not module.automatic_optimization:
        if getattr(inner, "__name__", "") == "do_nothing_closure":
            raise InvalidArgumentError(
                f"{name} has to make the backward pass where it chooses: in manual optimization call "
                "optimizer.step(closure), where the closure calls optimizer.zero_grad() and manual_backward(loss) and "
                "returns the loss"
            )
        return None
    trainer = module.trainer
    if passes == 1 and trainer.accumulate_grad_batches == 1:
        return None
    if trainer.accumulate_grad_batches > 1:
        raise InvalidArgumentError(
            f"{name} sees only the last of Lightning's accumulate_grad_batches={trainer.accumulate_grad_batches}: "
            f"{CALLBACK}"
        )
    if trainer.gradient_clip_val and (uses_first() or trainer.gradient_clip_algorithm == "value"):
        raise InvalidArgumentError(
            f"Lightning's gradient_clip_val clips the first gradient of {name} too, which changes the step: {CALLBACK}, "
            f"or make it {name}(..., max_norm={trainer.gradient_clip_val})"
        )
    return (
        f"Lightning's logs, metrics and hooks count both passes of each {name} step: {CALLBACK}, which makes them count "
        "one (warned once)"
    )


def _is_lightning(function: object) -> bool:
    kinds = type(getattr(function, "__self__", None)).__mro__
    return any(kind.__module__.split(".")[0] in ("lightning", "pytorch_lightning") for kind in kinds)
