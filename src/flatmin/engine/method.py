"""What a training method is to the engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..losses import MESA, SAF


@dataclass(frozen=True)
class Ingredients:
    """What a method is put together from."""

    model: nn.Module
    optimizer: Optimizer
    num_samples: int
    num_classes: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Assembled:
    """A method, ready for the loop: what makes the step, and what is added to the criterion.

    Attributes:
        optimizer: Called as ``optimizer.step(closure)``.
        trajectory: The module with ``set_epoch`` and state, or None.
        penalty: Called as ``penalty(logits, index, inputs)`` in the closure, or None.
        extra_bytes: What the method has in memory beyond the base optimizer while a pass runs, at most, in bytes.
    """

    optimizer: Optimizer
    trajectory: SAF | MESA | None = None
    penalty: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    extra_bytes: int = 0


@dataclass(frozen=True)
class Method:
    """A way to train: its name, its hyperparameters with their defaults, and how to put it together.

    Attributes:
        closure_calls: How often a step calls the closure; or a function of the step's number, from 0, and the
            hyperparameters to it.
    """

    name: str
    summary: str
    defaults: Mapping[str, float | str | None]
    assemble: Callable[[Ingredients, Mapping[str, Any]], Assembled]
    closure_calls: int | Callable[[int, Mapping[str, Any]], int] = 1

    def calls(self, step: int, settings: Mapping[str, Any]) -> int:
        """How often step number ``step`` calls the closure with these hyperparameters."""
        return self.closure_calls(step, settings) if callable(self.closure_calls) else self.closure_calls
