"""What averages of a network's weights share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidArgumentError
from ._average import copied, evaluating


class WeightAverage(nn.Module, ABC):
    """An average of a network's weights along its training, to evaluate in place of the network.

    `update` takes the network's current weights into the average; each subclass says when to call it. Calling the
    average runs the averaged network, in evaluation mode and without gradient. Floating buffers (batch-norm
    statistics) are averaged with the weights, integer ones are copied. ``state_dict`` has all that a resumed run needs.

    Args:
        model: The network that is trained, already on its device, wrapped (DistributedDataParallel, torch.compile) or
            not. It is copied.

    Attributes:
        module: The averaged network itself, without wrappers, in evaluation mode.
        n_averaged: How many networks it has seen: the one it was made from, and one for each `update`; int64.

    Raises:
        InvalidArgumentError: (a ValueError) if ``model`` cannot be copied.
    """

    module: nn.Module
    n_averaged: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copied(model)
        self.register_buffer("n_averaged", torch.ones((), dtype=torch.int64, device="cpu"))
        self._model = (model,)  # in a tuple, so that it is no submodule and not saved twice

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""
        return self._model[0]

    @abstractmethod
    def update(self) -> None:
        """Takes the network's current weights into the average."""

    @abstractmethod
    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Makes ``optimizer`` call `update` after each of its steps; ``remove()`` of the handle detaches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged network, in evaluation mode and without gradient."""
        with evaluating(self.module):
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "WeightAverage":
        """Sets the mode of this module; the averaged network stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}average.n_averaged" in state_dict:
            raise InvalidArgumentError(
                "the state's average was saved by an earlier version of flatmin, whose layout was another; nothing was "
                "loaded, begin with a new average or go on with that version"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def after_each_step(optimizer: Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Makes ``optimizer`` make a call after each of its steps; not after one that flatmin's has dropped."""

    def after(stepped: Optimizer, *_: Any) -> None:
        if not getattr(stepped, "step_dropped", False):
            call()

    return optimizer.register_step_post_hook(after)
