"""The largest logits of each sample, and what the rest weigh together."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from ..errors import InvalidArgumentError
from ._base import History
from ._rows import from_bytes

MOST_CLASSES = 2**16  # that two bytes can number


class TopKHistory(History):
    """Keeps the ``k`` largest logits of a row with their classes, and the rest as one: ``4 k + 2`` bytes.

    Past and present are compared over ``k + 1`` outcomes, the ``k`` classes and "another one", whose softened
    probability is that of the rest: at temperature 5 most of the mass is there, and to leave it out would be another
    loss. Within the rest nothing is compared.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``, at most 65,536.
        temperature: That of the loss: the rest's weight depends on it.
        k: How many logits are kept; fewer than ``C``.
        lag: Number of epochs between writing and reading.
        path: See `History`.
        location: See `History`.
        sharing: See `History`.

    Raises:
        InvalidArgumentError: If an argument is out of its bounds, or the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> from flatmin.history import TopKHistory
        >>> TopKHistory(num_samples=1000, num_classes=1000, k=24).row_bytes
        98
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        temperature: float = 5.0,
        k: int = 24,
        lag: int = 3,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
    ) -> None:
        self.k = check_integer("k", k, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        if not self.k < check_integer("num_classes", num_classes, least=2) <= MOST_CLASSES:
            raise InvalidArgumentError(
                f"k={k} and num_classes={num_classes}: k must be less than the number of classes, and they at most "
                f"{MOST_CLASSES}; for few classes take history='int8', for more 'lowrank'"
            )
        super().__init__(
            num_samples, num_classes, row_bytes=4 * k + 2, lag=lag, path=path, location=location, sharing=sharing
        )

    def encode(self, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.encode`."""
        logits = logits.float()
        whole = logits.isfinite().all(dim=1)
        logits = logits.where(whole[:, None], 0)
        values, classes = logits.topk(self.k, dim=1)
        values = torch.cat([values, self._rest(logits, classes)], dim=1)
        values = (values - values[:, :1]).clamp(min=torch.finfo(torch.float16).min).half()
        # Two bytes hold class numbers up to 65,535 if they are taken from -32,768 on.
        numbers = (classes - MOST_CLASSES // 2).to(torch.int16)
        return torch.cat([values.view(torch.uint8), numbers.view(torch.uint8)], dim=1), whole

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `History.decode`: the rest's shape is the present one, its weight the past one."""
        values, classes = self._split(rows)
        logits = logits.float()
        shifted = logits - self._rest(logits, classes) + values[:, -1:]
        return shifted.scatter(1, classes, values[:, :-1])

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.compare`: over ``k + 1`` outcomes."""
        values, classes = self._split(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.cat([logits.gather(1, classes), self._rest(logits, classes)], dim=1), values

    def describe(self) -> dict[str, Any]:
        """See `History.describe`."""
        return {**self._shape(), "k": self.k, "temperature": self.temperature}

    def _rest(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The logit that has, at the temperature, the weight of all but ``classes``, shape (B, 1)."""
        rest = (logits / self.temperature).scatter(1, classes, -torch.inf)
        return self.temperature * rest.logsumexp(dim=1, keepdim=True)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, classes = torch.split(rows, [2 * self.k + 2, 2 * self.k], dim=1)
        numbers = from_bytes(classes, torch.int16).long() + MOST_CLASSES // 2
        # A row that was never written is all zeros, and its classes must be numbers of classes all the same.
        return from_bytes(values, torch.float16).float(), numbers.clamp(max=self.num_classes - 1)
