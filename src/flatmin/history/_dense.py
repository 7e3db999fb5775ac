"""Every logit of every sample, as the paper keeps them."""

import torch
from torch import Tensor

from ._base import History

NEVER = -1


class DenseHistory(History):
    """Keeps ``lag`` rows of ``C`` logits for each sample: ``lag * N * (4 C + 4)`` bytes in float32.

    Since a slot is read before it is overwritten, ``lag`` slots are enough (the authors' code has ``lag + 1``).
    Each slot carries the epoch it was written in, so a sample that was skipped is never confused with one
    recorded in an older epoch.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        lag: Number of epochs between writing and reading.

    Example:
        >>> import torch
        >>> from flatmin.history import DenseHistory
        >>> history = DenseHistory(num_samples=4, num_classes=2, lag=1)
        >>> history.put(torch.tensor([2]), 0, torch.tensor([[1.0, -1.0]]))
        >>> history.get(torch.tensor([2, 3]), 1)
        (tensor([[ 1., -1.], [ 0., 0.]]), tensor([ True, False]))
        >>> history.nbytes
        48
    """

    logits: Tensor
    epochs: Tensor

    def __init__(self, num_samples: int, num_classes: int, lag: int) -> None:
        super().__init__(num_samples, num_classes, lag)
        self.register_buffer("logits", torch.zeros(lag, num_samples, num_classes))
        self.register_buffer("epochs", torch.full((lag, num_samples), NEVER, dtype=torch.int32))

    def get(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.get`."""
        slot = epoch % self.lag
        recorded = self.epochs[slot].index_select(0, index) == epoch - self.lag
        return self.logits[slot].index_select(0, index), recorded

    def put(self, index: Tensor, epoch: int, logits: Tensor) -> None:
        """See `History.put`."""
        slot = epoch % self.lag
        rows = logits.to(self.logits.dtype)
        finite = rows.isfinite().all(dim=1)
        self.logits[slot].index_copy_(0, index, rows.where(finite[:, None], 0))
        self.epochs[slot].index_copy_(0, index, torch.where(finite, epoch, NEVER).to(self.epochs.dtype))
