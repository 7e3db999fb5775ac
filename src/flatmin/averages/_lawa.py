"""LAWA: the mean of a network's weights at the ends of its last epochs, evaluated in its place.

*Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*, Kaddour 2022,
arXiv 2209.14981::

    average_e = 1/k * sum of the models at the ends of epochs e - k + 1 ... e
"""

import torch
from torch import Tensor, nn

from .._checks import check_integer
from ._average import floating, overwrite
from ._base import WeightAverage


class LAWA(WeightAverage):
    """Keeps the weights of the last ``k`` epochs' ends and their mean, and lets training be: no pass, k + 1 copies.

    Before ``k`` epochs have gone by it is the mean of those there are.

    Args:
        model: The network that is trained. It is copied.
        k: Epochs, at least 1; the paper's is 6.

    Raises:
        InvalidArgumentError: (a ValueError) if ``k`` is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> lawa = flatmin.LAWA(model, k=2)
        >>> for value in (1.0, 2.0, 4.0):  # three epochs
        ...     _ = torch.nn.init.constant_(model.bias, value)
        ...     lawa.epoch_done()
        >>> lawa.average.module.bias.tolist()
        [3.0, 3.0, 3.0]
    """

    epochs: Tensor

    def __init__(self, model: nn.Module, *, k: int = 6) -> None:
        self.k = check_integer("k", k, least=1)
        super().__init__(model)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64, device="cpu"))
        # A slot for each of the last k epochs; buffers, so that they are saved and moved with the module.
        for number, tensor in enumerate(floating(self.average.module)):
            self.register_buffer(f"past_{number}", tensor.new_zeros((self.k, *tensor.shape)))

    def step_done(self) -> None:
        """Does nothing."""

    @torch.no_grad()
    def epoch_done(self) -> None:
        """Remembers the network as it is now, in place of the oldest, and makes the mean anew."""
        slot = int(self.epochs) % self.k
        self.epochs += 1
        known = min(int(self.epochs), self.k)
        network = self.average.module
        overwrite(network, self.model)  # integer buffers too
        for number, tensor in enumerate(floating(network)):
            past: Tensor = getattr(self, f"past_{number}")
            past[slot].copy_(tensor)
            tensor.copy_(past[:known].mean(dim=0))
