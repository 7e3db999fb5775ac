"""What a training method is to the engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ...averages import WeightAverage
from ...losses import MESA, SAF, OnlineLabelSmoothing


@dataclass(frozen=True)
class Ingredients:
    """What a method is put together from.

    Attributes:
        scaler: Scales the loss where it trains in float16; one that does nothing elsewhere.
    """

    model: nn.Module
    optimizer: Optimizer
    num_samples: int
    num_classes: int
    steps_per_epoch: int
    epochs: int
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))


@dataclass(frozen=True)
class Assembled:
    """A method, ready for the loop: what makes the step, and what is added to the criterion.

    Attributes:
        optimizer: Called as ``optimizer.step(closure)``.
        trajectory: The module with ``set_epoch`` and state, or None.
        penalty: Called as ``penalty(logits, y, index, inputs)`` in the closure, or None.
        average: What is evaluated in place of the network, or None. Attached to the optimizer already, if it follows
            its steps.
        at_epoch_end: Called after each epoch, before the evaluation.
        chooses: Whether the closure is told which samples to take, and returns the loss of each, as ESAM's.
        extra_bytes: What the method has in memory beyond the base optimizer while a pass runs, at most, in bytes.
    """

    optimizer: Optimizer
    trajectory: SAF | MESA | OnlineLabelSmoothing | None = None
    penalty: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None
    extra_bytes: int = 0
    average: WeightAverage | None = None
    chooses: bool = False
    at_epoch_end: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    """A way to train: its name, its hyperparameters with their defaults, and how to put it together.

    Attributes:
        closure_calls: How often a step that pays calls the closure; the others call it once.
        pays: Whether step number ``step``, from 0, of ``steps`` pays, by ``(step, settings, steps)``; None where only
            the gradients tell. All do if it is not given.
    """

    name: str
    summary: str
    defaults: Mapping[str, float | str | None]
    assemble: Callable[[Ingredients, Mapping[str, Any]], Assembled]
    closure_calls: int = 1
    pays: Callable[[int, Mapping[str, Any], int], bool | None] = lambda step, settings, steps: True

    def calls(self, step: int, settings: Mapping[str, Any], steps: int) -> int | None:
        """How often step number ``step`` of ``steps`` calls the closure; None where only the gradients tell."""
        pays = self.pays(step, settings, steps)
        return None if pays is None else self.closure_calls if pays else 1
