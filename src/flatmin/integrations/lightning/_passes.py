"""The passes of a step inside Lightning's loop: what the methods of its strategy are replaced with.

Lightning calls ``strategy.training_step`` and ``strategy.backward`` for each micro-batch, and with the last one
``strategy.optimizer_step(optimizer, closure)``, which leads through hooks, clipping and the scaler to
``optimizer.step``. The passes are made before that, so that all of it happens once, to the gradient to step with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from ..._passes import current_pass
from ..._rng import CPU, Everywhere
from ...optim import SharpnessAware as Optimizer
from ...optim._first_pass import Beginning
from ...optim._surroundings import Buffers
from ._quiet import quiet

REPLACED = ("training_step", "backward", "optimizer_step")


class Passes(ABC):
    """Makes the passes of an optimizer between `install` and `remove`.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        optimizer: The optimizer, one of the strategy's.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        self.trainer, self.module, self.optimizer = trainer, module, optimizer
        self.strategy: Any = trainer.strategy
        self.theirs: dict[str, Callable[..., Any]] = {name: getattr(self.strategy, name) for name in REPLACED}

    def install(self) -> None:
        """Replaces the strategy's methods, of this one object."""
        for name in REPLACED:
            setattr(self.strategy, name, getattr(self, f"_{name}"))

    def remove(self) -> None:
        """Puts the strategy's methods back."""
        self.settle()
        for name in REPLACED:
            vars(self.strategy).pop(name, None)

    @abstractmethod
    def settle(self) -> None:
        """Has the weights where they belong, whatever went before."""

    @abstractmethod
    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``strategy.training_step``: the forward pass of a micro-batch, in the first pass."""

    @abstractmethod
    def _make(self, closure: Callable[[], Tensor | None]) -> Tensor | None:
        """Makes the passes; returns the loss, or None if there is no step to be made."""

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.theirs["backward"](loss, *args, **kwargs)

    def _optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        if optimizer is not self.optimizer:
            return self.theirs["optimizer_step"](optimizer, closure, *args, **kwargs)
        if self._forward_only():
            return closure()
        loss = self._make(closure)
        if loss is None:  # training_step has skipped the batch
            return None
        with passes_made(optimizer):
            return self.theirs["optimizer_step"](optimizer, lambda: loss, *args, **kwargs)

    def _forward_only(self) -> bool:
        """Whether Lightning makes statistics of batch norm anew, for its average of weights, and trains nothing."""
        return bool(self.trainer.fit_loop._skip_backward)

    def _scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass
class Window:
    """The micro-batches of a step, so far.

    Attributes:
        begun: How the step began.
        batches: What ``training_step`` was called with, and the states of the generators before; only where it has
            returned a loss.
    """

    begun: Beginning = field(default_factory=lambda: Beginning(seen=True, inside=True))
    batches: list[tuple[tuple[Any, ...], dict[str, Any], Everywhere | None]] = field(default_factory=list)


class TwoPasses(Passes):
    """The passes of SAM and its like: the second goes over the micro-batches of the first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._window = Window()

    def settle(self) -> None:
        """Gives up a step that was interrupted."""
        self.optimizer.abandon()
        self._window = Window()

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_only():
            return self.theirs["training_step"](*args, **kwargs)
        window = self._renewed()
        random = self._random() if self.optimizer._replay else None
        if window.begun.buffers is None and current_pass() is None:  # which would have seen to it
            window.begun.buffers = Buffers(self.optimizer._surroundings.modules(self._parameters()))
            window.begun.random = [] if random is None else [random]
        output = self.theirs["training_step"](*args, **kwargs)
        if loss_of(output) is not None:
            window.batches.append((args, kwargs, random))
        return output

    def _renewed(self) -> Window:
        """The window, without what is left of a step that was never made: Lightning clears the gradients then."""
        first = self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0
        if first and self._window.batches:
            self._window = Window()
        return self._window

    def _make(self, closure: Callable[[], Tensor | None]) -> Tensor | None:
        window = self._renewed()
        loss: Tensor | None = None
        try:
            with closing(self.optimizer._passes_beside(window.begun)) as passes:
                for index in passes:
                    if index > 0 and not self._second_pass(window):
                        return None
                    if index == 0:
                        loss = closure()
                        if not window.batches or (loss is None and self._scaled()):
                            return None
        finally:
            self._window = Window()
        return torch.zeros(()) if loss is None else loss

    @torch.enable_grad()
    def _second_pass(self, window: Window) -> bool:
        """Makes it; returns False where ``training_step`` returns None in it, which leaves the step out."""
        count = len(window.batches)
        with quiet(self.trainer, self.module):
            for number, (args, kwargs, random) in enumerate(window.batches, start=1):
                if random is not None:
                    random.set()
                with self._apart(number < count):
                    loss = loss_of(self.theirs["training_step"](*args, **kwargs))
                    if loss is None:
                        return False
                    self.theirs["backward"](loss / self.trainer.accumulate_grad_batches, self.optimizer)
        return True

    @contextmanager
    def _apart(self, apart: bool) -> Iterator[None]:
        """Inside, gradients are not averaged over ranks, if ``apart``."""
        if apart and isinstance(self.strategy, ParallelStrategy):
            with self.strategy.block_backward_sync():
                yield
        else:
            yield

    def _random(self) -> Everywhere:
        return Everywhere.on({CPU, *(parameter.device for parameter in self._parameters())})


class OnePass(Passes):
    """The passes of MSAM and S2SAM, with the weights moved in those of each micro-batch, and in nothing else."""

    def settle(self) -> None:
        """Puts the weights back after a pass that was interrupted."""
        self.optimizer.abandon()

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_only():
            return self.theirs["training_step"](*args, **kwargs)
        self.optimizer.perturb()
        output = self.theirs["training_step"](*args, **kwargs)
        if loss_of(output) is None:
            self.settle()
        return output

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super()._backward(loss, *args, **kwargs)
        self.optimizer.restore()
        return result

    def _make(self, closure: Callable[[], Tensor | None]) -> Tensor | None:
        loss = closure()
        if loss is None and (self._scaled() or all(parameter.grad is None for parameter in self._parameters())):
            return None
        return torch.zeros(()) if loss is None else loss


def loss_of(output: Any) -> Tensor | None:
    """The loss that ``training_step`` has returned."""
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


@contextmanager
def passes_made(optimizer: Optimizer) -> Iterator[None]:
    """Inside, ``optimizer.step(closure)`` calls the closure once and makes the step whose passes were made before."""
    known = vars(optimizer).get("step")  # which a scheduler has put there
    step: Callable[[], Any] = optimizer.step

    def made(closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        step()
        return loss

    vars(optimizer)["step"] = made
    try:
        yield
    finally:
        vars(optimizer).pop("step")
        vars(optimizer).update({} if known is None else {"step": known})
