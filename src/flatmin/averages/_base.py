"""What averages of a network's weights share."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._average import copied, evaluating


class WeightAverage(nn.Module, ABC):
    """An average of a network along its training, kept up to date by two calls, and evaluated in its place.

    Called as the network is, it runs the average in evaluation mode and without gradient. Floating buffers (batch-norm
    statistics) are averaged with the weights, integer ones are copied. ``state_dict`` has all that a resumed run needs.

    Args:
        model: The network that is trained, already on its device, wrapped (DistributedDataParallel, torch.compile) or
            not. It is copied.
        decay: Of the average, to warn of a dtype too coarse for it.

    Attributes:
        average: A ``torch.optim.swa_utils.AveragedModel`` in evaluation mode; ``average.module`` is the network itself.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.0) -> None:
        super().__init__()
        self.average = copied(model, decay)
        self._model = (model,)  # in a tuple, so that it is no submodule and not saved twice

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""
        return self._model[0]

    @abstractmethod
    def step_done(self) -> None:
        """Call it after each ``optimizer.step()``, or `attach` once."""

    @abstractmethod
    def epoch_done(self) -> None:
        """Call it after each epoch, before the evaluation."""

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Calls `step_done` after each step of ``optimizer`` by itself; the handle's ``remove()`` detaches."""
        return optimizer.register_step_post_hook(lambda *_: self.step_done())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged network in evaluation mode."""
        with evaluating(self.average):
            return self.average(*args, **kwargs)

    def train(self, mode: bool = True) -> "WeightAverage":
        """Sets the mode of this module; the average stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self
