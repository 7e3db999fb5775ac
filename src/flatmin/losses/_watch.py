"""Watches which samples SAF is given and how many of them it compares, and warns once of what cannot be meant."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._arrival import Arrival
from ._kinship import Kinship

_OVER_AND_OVER = 8  # times that an epoch gives each of its indices, from which on it cannot be meant
_LABELS = 4  # the same, where all indices are classes too
_ENOUGH = 100  # samples of an epoch, below which a share says nothing


class Watch:
    """Counts the samples of each epoch, and judges it in the next one. A copy or a pickle begins anew.

    It never waits for an accelerator: what is counted there is judged when it has arrived, and indices that are there
    are not looked at.

    Args:
        num_samples: Number of samples in the data set.
        num_classes: Number of classes.
        lag: Each output is compared with the one from so many epochs earlier.
    """

    def __init__(self, num_samples: int, num_classes: int, lag: int) -> None:
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.lag = lag
        self._first = 0  # the epoch from which on there is a past
        self._nothing = False  # whether the last epoch that compared found nothing to compare with
        self._warned = False
        self._now: _Epoch | None = None
        self._ended: _Epoch | None = None
        self._kinship = Kinship(num_samples, num_classes)

    def __call__(self, epoch: int, index: Tensor, logits: Tensor, mask: Tensor | None) -> None:
        """Counts a batch.

        Args:
            epoch: The current epoch.
            index: Sample indices, shape (B,).
            logits: The network's outputs, shape (B, C).
            mask: Which samples of the batch are compared, bool, shape (B,); None if none can be in this epoch.
        """
        if self._warned or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._now is None or self._now.number != epoch:
            if self._now is not None:
                self._now.end()
            self._now, self._ended = _Epoch(epoch, self.num_samples), self._now
        self._now.count(index, mask)
        fault = None
        if self._ended is not None and self._ended.has_arrived():
            fault, self._ended = self._fault(self._ended), None
        if not self._kinship.settled and self._kinship(epoch, index, logits) and fault is None:
            fault = (
                f"finds, up to epoch {epoch - 1}, the network's outputs no nearer to its earlier ones on the same "
                "index than to those on other indices, so an index does not name the same sample in each epoch, unless "
                "the network has learnt nothing yet: index a data set before it shuffles or resamples, by "
                "flatmin.indexed(dataset); where each epoch makes its samples anew take flatmin.MESA, which needs no "
                "index"
            )
        if fault is not None:
            self._warned = True
            warnings.warn(f"SAF {fault}", FlatminWarning, stacklevel=depth_in_package())

    def begin(self, epoch: int) -> None:
        """Notes that nothing was recorded before ``epoch``, so that nothing can be compared for a while."""
        self._first = epoch + self.lag

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": None, "_ended": None}

    def _fault(self, epoch: "_Epoch") -> str | None:
        """What is wrong with an epoch."""
        distinct = int(epoch.drawn.sum())
        classes = distinct == int(epoch.drawn[: self.num_classes].sum())
        if distinct and epoch.looked_at >= distinct * (_LABELS if classes else _OVER_AND_OVER):
            return (
                f"saw {epoch.looked_at} samples in epoch {epoch.number} and only {distinct} different indices"
                f"{', all of them class numbers' if classes else ''}, so samples share a past: give it each sample's "
                "index in the data set, not its label or its place in the batch; flatmin.with_indices(loader) yields it"
            )
        if epoch.compared is None or epoch.asked < _ENOUGH or epoch.number < self._first:
            return None
        share = int(epoch.compared) / epoch.asked
        # A single epoch with nothing may be the codec's: "lowrank" keeps nothing of its first.
        few = share < 0.5 and (share > 0 or self._nothing)
        self._nothing = share == 0
        if not few:
            return None
        return (
            f"compared {share:.0%} of its samples in epoch {epoch.number}: the others were not recorded in epoch "
            f"{epoch.number - self.lag}, or came twice, and count as 0 in the mean. Let each epoch draw every sample "
            'once (no replacement, no limit to its batches), or take history="mean", which compares with the last time '
            "a sample was seen"
        )


class _Epoch:
    """What is counted of an epoch.

    Attributes:
        number: Which epoch.
        drawn: Whether each sample occurred, bool, shape (N,).
        looked_at: Samples whose index went into ``drawn``.
        asked: Samples that could have been compared.
        compared: Those that were; None if nothing could be.
    """

    def __init__(self, number: int, num_samples: int) -> None:
        self.number = number
        self.drawn = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
        self.looked_at = 0
        self.asked = 0
        self.compared: Tensor | None = None
        self._arrival: Arrival | None = None

    def count(self, index: Tensor, mask: Tensor | None) -> None:
        """Counts a batch."""
        if index.device.type == "cpu":
            self.drawn.index_fill_(0, index.to(torch.int64), True)
            self.looked_at += len(index)
        if mask is not None:
            compared = mask.sum()
            self.compared = compared if self.compared is None else self.compared + compared
            self.asked += len(mask)

    def end(self) -> None:
        """Begins to fetch what was counted on an accelerator."""
        if self.compared is not None:
            self._arrival = Arrival(self.compared)
            self.compared = self._arrival.value

    def has_arrived(self) -> bool:
        """Whether all counts can be read."""
        return self._arrival is None or self._arrival.is_here()
