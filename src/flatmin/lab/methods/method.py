"""What a training method is made from, and what the training loop gets of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ...averages import WeightAverage


class Trajectory(Protocol):
    """A module that is told which epoch begins, such as SAF; ``state_dict`` has all that a resumed run needs."""

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, from 0."""

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.nn.Module``."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """As of ``torch.nn.Module``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``torch.nn.Module``."""

    def buffers(self) -> Iterator[Tensor]:
        """As of ``torch.nn.Module``."""


@dataclass(frozen=True)
class Ingredients:
    """What a method is put together from.

    Attributes:
        model: The network, on its device; under ``DistributedDataParallel`` wrapped in it.
        optimizer: The base optimizer.
        num_samples: Samples of the training set; their indices run from 0.
        num_classes: Classes.
        steps_per_epoch: Steps of an epoch.
        epochs: Length of the run.
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
        optimizer: Called as ``optimizer.step(closure)``: the base optimizer, a `flatmin.optim.SharpnessAware`, or
            another around the base one that shares its ``param_groups`` and ``state``.
        trajectory: The module with ``set_epoch`` and state, or None.
        penalty: Called as ``penalty(logits, y, index, inputs)`` in the closure, or None.
        prepare: Called with the inputs before the network's pass in the closure: starts what can run beside it. None:
            nothing.
        average: What is evaluated in place of the network, or None. Attached to the optimizer already, if it follows
            its steps.
        at_epoch_end: Called after each epoch, before the evaluation.
        refresh: Called with batches of training inputs after each epoch, just before the evaluation, and before the
            first: makes batch-norm statistics anew. None: the average's `refresh`, if there is an average.
        chooses: Whether the closure is told which samples to take, and returns the loss of each, as ESAM's.
        attach: Where training is private, called with what Opacus makes of network and optimizer. None: nothing.
        extra_bytes: What the method has in memory beyond the base optimizer while a pass runs, at most, in bytes.
    """

    optimizer: Optimizer
    trajectory: Trajectory | None = None
    penalty: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None
    extra_bytes: int = 0
    average: WeightAverage | None = None
    chooses: bool = False
    attach: Callable[[Any, Any], Any] | None = None
    at_epoch_end: Callable[[], None] = lambda: None
    refresh: Callable[[Iterable[Any]], None] | None = None
    prepare: Callable[[Any], None] | None = None
