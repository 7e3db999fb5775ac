"""The largest logits of each sample, and the weight of all others together."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._codec import Codec
from ._rows import from_bytes

MOST_CLASSES = 2**16  # as many as two bytes can index


class TopK(Codec):
    """Keeps the ``k`` largest logits of a row with their classes, and the rest as one: ``4 k + 2`` bytes.

    **Avoid it** unless you need exactly these logits: at the same size `LowRank` keeps four fifths of the dense
    history's gain, and this a fifth.

    Past and present are compared over ``k + 1`` outcomes: the ``k`` classes and "any other", which has the softened
    probability of the rest. At temperature 5 most of the probability is there, so the loss would be another one
    without it. Within the rest nothing is compared.

    Args:
        k: How many logits to keep; less than ``C``, which may be at most 65,536.

    Raises:
        InvalidArgumentError: If ``k`` is out of its bounds, or the history keeps a running mean.

    Example:
        >>> from flatmin.history import History, TopK
        >>> History(TopK(k=24), num_samples=1000, num_classes=1000).row_bytes
        98
    """

    merges: ClassVar[bool] = True

    def __init__(self, k: int = 24) -> None:
        super().__init__()
        self.k = check_integer("k", k, least=1)

    def prepare(self) -> int:
        """See `Codec.prepare`."""
        self._refuse_mean()
        if not self.k < self.num_classes <= MOST_CLASSES:
            raise InvalidArgumentError(
                f"k={self.k} and num_classes={self.num_classes}: k must be less than the number of classes, and they "
                f"at most {MOST_CLASSES}; for few classes take history='int8', for more 'lowrank'"
            )
        return 4 * self.k + 2

    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Codec.encode`."""
        logits = logits.float()
        finite = logits.isfinite().all(dim=1)
        logits = logits.where(finite[:, None], 0)
        values, classes = logits.topk(self.k, dim=1)
        values = torch.cat([values, self._rest(logits, classes)], dim=1)
        values = (values - values[:, :1]).clamp(min=torch.finfo(torch.float16).min).half()
        # Two bytes hold class indices up to 65,535 if they are counted from -32,768 on.
        indices = (classes - MOST_CLASSES // 2).to(torch.int16)
        return torch.cat([values.view(torch.uint8), indices.view(torch.uint8)], dim=1), finite

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `Codec.decode`: the rest has the current shape and the past weight."""
        values, classes = self._split(rows)
        logits = logits.float()
        shifted = logits - self._rest(logits, classes) + values[:, -1:]
        return shifted.scatter(1, classes, values[:, :-1])

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `Codec.compare`: over ``k + 1`` outcomes."""
        values, classes = self._split(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.cat([logits.gather(1, classes), self._rest(logits, classes)], dim=1), values

    def describe(self) -> dict[str, Any]:
        """See `Codec.describe`: the weight of the rest depends on the temperature."""
        return {"k": self.k, "temperature": self.temperature} if self.is_bound else {"k": self.k}

    def _rest(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The logit that has, at the temperature, the weight of all but ``classes``; shape (B, 1)."""
        rest = (logits / self.temperature).scatter(1, classes, -torch.inf)
        return self.temperature * rest.logsumexp(dim=1, keepdim=True)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, classes = torch.split(rows, [2 * self.k + 2, 2 * self.k], dim=1)
        indices = from_bytes(classes, torch.int16).long() + MOST_CLASSES // 2
        # A row that was never written is all zeros, and its classes must be valid indices too.
        return from_bytes(values, torch.float16).float(), indices.clamp(max=self.num_classes - 1)
