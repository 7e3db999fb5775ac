"""LAWA: the mean of a network's weights at the ends of its last epochs, evaluated in its place.

*Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*, Kaddour 2022,
arXiv 2209.14981::

    average_e = 1/k * sum of the models at the ends of epochs e - k + 1 ... e
"""

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._average import floating, overwrite
from ._base import WeightAverage


class LAWA(WeightAverage):
    """Keeps the weights of the last ``k`` epochs' ends and their mean; training is not touched. No pass, k + 1 copies.

    ``average_e = 1/k * sum of the models at the ends of epochs e - k + 1 ... e``, or of all if there are less than k.

    Call `update` after each epoch, before the evaluation.

    Args:
        model: The network that is trained, already on its device, wrapped or not. It is copied.
        k: Number of epochs, at least 1; 6 in the paper.

    Attributes:
        module: The averaged network itself.
        n_averaged: 1 plus the number of updates, int64.

    Raises:
        InvalidArgumentError: (a ValueError) if ``k`` is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> lawa = flatmin.LAWA(model, k=2)
        >>> for value in (1.0, 2.0, 4.0):  # three epochs
        ...     _ = torch.nn.init.constant_(model.bias, value)
        ...     lawa.update()
        >>> lawa.module.bias.tolist()
        [3.0, 3.0, 3.0]
    """

    def __init__(self, model: nn.Module, *, k: int = 6) -> None:
        self.k = check_integer("k", k, least=1)
        super().__init__(model)
        # A slot for each of the last k epochs, as buffers, so that they are saved and moved with the module.
        for number, tensor in enumerate(floating(self.module)):
            self.register_buffer(f"past_{number}", tensor.new_zeros((self.k, *tensor.shape)))

    @torch.no_grad()
    def update(self) -> None:
        """Records the network's weights in place of the oldest and takes the mean. Call it after each epoch."""
        epochs = int(self.n_averaged) - 1  # before this one; the network it was made from is no epoch's end
        self.n_averaged += 1
        overwrite(self.module, self.model)  # integer buffers too
        for number, tensor in enumerate(floating(self.module)):
            past: Tensor = getattr(self, f"past_{number}")
            past[epochs % self.k].copy_(tensor)
            tensor.copy_(past[: min(epochs + 1, self.k)].mean(dim=0))

    def attach(self, optimizer: Optimizer) -> NoReturn:
        """Raises `InvalidArgumentError`: LAWA averages the ends of epochs, of which an optimizer knows nothing."""
        raise InvalidArgumentError(
            "LAWA averages the ends of epochs, and not steps: leave out attach, and call lawa.update() after each epoch"
        )

    def extra_repr(self) -> str:
        """Shows the number of epochs when printed."""
        return f"k={self.k}"
