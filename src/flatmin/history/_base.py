"""What every history of past outputs can do."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class History(nn.Module, ABC):
    """Remembers what a network said about each sample in the last ``lag`` epochs.

    A history is an ``nn.Module`` whose state is all buffers, so that ``.to()``, ``state_dict`` and
    ``load_state_dict`` carry it. No method synchronises with an accelerator.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        lag: Number of epochs after which an output is read again; also the number of slots.
    """

    def __init__(self, num_samples: int, num_classes: int, lag: int) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.lag = lag

    @abstractmethod
    def get(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Reads what was recorded exactly ``lag`` epochs before ``epoch``.

        Args:
            index: Sample numbers, int64, shape (B,), on the history's device.
            epoch: The current epoch, from 0.

        Returns:
            The logits, shape (B, C), finite everywhere, and a bool mask, shape (B,), of the samples that have some.
        """

    @abstractmethod
    def put(self, index: Tensor, epoch: int, logits: Tensor) -> None:
        """Records ``logits`` as the output of epoch ``epoch``, over what the slot held before.

        A row that is not finite is recorded as missing. Where an index comes twice the rows must be equal.

        Args:
            index: Sample numbers, int64, shape (B,), on the history's device.
            epoch: The current epoch, from 0.
            logits: Detached outputs, shape (B, C).
        """

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the history lives."""
        return next(self.buffers()).device
