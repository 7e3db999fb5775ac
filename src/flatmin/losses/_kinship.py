"""Whether an index names the same sample in each epoch, judged by the network's own outputs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..history._store import move
from ._arrival import Arrival

_MOST = 256  # samples whose outputs are kept
_NUMBERS = 2**20  # most numbers that are kept, unless the classes are very many
_LEAST = 32  # samples, then
_ENOUGH = 200  # comparisons, below which nothing is judged
_RELATED = 5.0  # standard errors, beyond which outputs are related
_STRANGE = 3.0  # standard errors, below which they may not be
_VARIED = 1e-3  # squared distance of two samples' directions, below which the network tells none apart
_LOWEST = -30.0  # logarithm of a probability; those of classes that are masked out are -inf
_NEVER = -1


class Kinship:
    """Compares outputs on some samples with their last ones, and with those of other samples.

    The logits of a sample are much what they were an epoch ago. Where they are no nearer to those than to the past
    logits of another sample, though they differ from sample to sample, the index does not name the same sample in each
    epoch. It looks in the first epochs, until it has found that they are related or that they are not, and never waits
    for an accelerator.

    Args:
        num_samples: Number of samples in the data set.
        num_classes: Number of classes.

    Attributes:
        settled: Whether there is nothing left to find out.
    """

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.settled = False
        self._size = min(num_samples, _MOST, max(_LEAST, _NUMBERS // num_classes))
        self._stride = num_samples // self._size
        self._epoch = 0
        self._kept: Tensor | None = None  # `_direction` of the last output on each, (size + 1, C); the last is refuse
        self._written: Tensor | None = None  # in which epoch, shape (size + 1,)
        self._sums: Tensor | None = None  # of this epoch, see `_compare`
        self._arrival: Arrival | None = None
        self._total = [0.0] * 5
        self._strikes = 0

    @torch.no_grad()
    def __call__(self, epoch: int, index: Tensor, logits: Tensor) -> bool:
        """Looks at a batch.

        Args:
            epoch: The current epoch.
            index: Sample indices, shape (B,).
            logits: The network's outputs, shape (B, C).

        Returns:
            Whether it has found, now, that outputs and samples are not related.
        """
        if epoch != self._epoch and self._sums is not None:
            self._arrival, self._sums = Arrival(self._sums), None
        self._epoch = epoch
        strange = self._judge()
        if not self.settled:
            self._look(index, logits)
        return strange

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_written": None, "_sums": None, "_arrival": None}

    def _look(self, index: Tensor, logits: Tensor) -> None:
        """Compares a batch with what is kept, and keeps it instead."""
        if self._kept is None or self._written is None or self._kept.device != logits.device:
            self._kept = logits.new_zeros(self._size + 1, logits.shape[1], dtype=torch.float32)
            self._written = torch.full((self._size + 1,), _NEVER, dtype=torch.int32, device=logits.device)
            self._sums = None
        slot = index // self._stride
        chosen = (index % self._stride == 0) & (slot < self._size)
        if chosen.device.type == "cpu" and not chosen.any():  # as most batches of a large data set
            return
        slot = move(slot.where(chosen, self._size), logits.device)
        other = (slot + self._size // 2) % self._size  # far away, where neighbours may be of the same class
        now = _direction(logits)
        fine = now.isfinite().all(dim=1)
        written, kept = self._written[slot], self._kept[slot]
        known = (slot < self._size) & fine & self._is_past(written) & self._is_past(self._written[other])
        sums = _compare(now, kept, self._kept[other], known)
        self._sums = sums if self._sums is None else self._sums + sums
        self._kept[slot] = now.where(fine[:, None], kept)
        self._written[slot] = written.where(~fine, self._epoch)

    def _is_past(self, written: Tensor) -> Tensor:
        return (written != _NEVER) & (written < self._epoch)

    def _judge(self) -> bool:
        """Whether what has arrived says that outputs and samples are not related, for the second time."""
        if self._arrival is None or not self._arrival.is_here():
            return False
        sums, self._arrival = self._arrival.value, None
        if sums is None:  # it could not be had without waiting
            self._settle()
            return False
        self._total = [a + b for a, b in zip(self._total, sums.tolist(), strict=True)]
        number, nearer, squares, apart, spread = self._total
        if number < _ENOUGH:
            return False
        mean = nearer / number
        error = math.sqrt(max(squares / number - mean**2, 0.0) / number)
        if mean > _RELATED * error:
            self._settle()
        if mean > _STRANGE * error:
            return False
        self._total = [0.0] * 5
        # Outputs that hardly depend on the sample, or less than they moved in the meantime, say nothing of the index.
        self._strikes = self._strikes + 1 if spread > number * _VARIED and spread >= apart / 2 else 0
        if self._strikes < 2:
            return False
        self._settle()
        return True

    def _settle(self) -> None:
        self.settled = True
        self._kept = self._written = self._sums = self._arrival = None


def _direction(logits: Tensor) -> Tensor:
    """Centred logits of length 1, which do not depend on how sure the network is; shape (B, C)."""
    shares = logits.float().log_softmax(dim=1).clamp(min=_LOWEST)
    return F.normalize(shares - shares.mean(dim=1, keepdim=True), dim=1)


def _compare(now: Tensor, own: Tensor, other: Tensor, known: Tensor) -> Tensor:
    """Sums over the samples of ``known``.

    Returns:
        Shape (5,): their number; by how much they are nearer to their own past than to another's, and its square; the
        squared distance to another's; and that to another output of the same batch.
    """
    apart = (now - other).square().sum(dim=1)
    nearer = apart - (now - own).square().sum(dim=1)
    spread = (now - now.roll(len(now) // 2, dims=0)).square().sum(dim=1)  # far away, past other views of a sample
    each = torch.stack([torch.ones_like(apart), nearer, nearer.square(), apart, spread])
    return each.where(known, 0).sum(dim=1)
