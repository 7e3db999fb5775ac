"""Every logit of every sample, as the paper keeps them, or in half precision."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._base import History
from ._rows import from_bytes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class DenseHistory(History):
    """Keeps all ``C`` logits of a row: ``4 C`` bytes in float32, ``2 C`` in float16.

    In 16 bits the row's largest logit is subtracted first, which no softmax feels, so that the likely classes, near 0,
    are kept most precisely.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        dtype: ``torch.float32``, ``float16``, ``bfloat16`` or ``float64``.
        lag: Number of epochs between writing and reading.
        momentum: See `History`.
        path: See `History`.
        location: See `History`.
        sharing: See `History`.

    Raises:
        InvalidArgumentError: If an argument is out of its bounds, or the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> import torch
        >>> from flatmin.history import DenseHistory
        >>> history = DenseHistory(num_samples=4, num_classes=2, lag=1)
        >>> history.record(history.open(torch.tensor([2]), epoch=0), torch.tensor([[1.0, -1.0]]))
        >>> now, then, counts = history.recall(history.open(torch.tensor([2, 3]), epoch=1), torch.zeros(2, 2))
        >>> then[0], counts
        (tensor([ 1., -1.]), tensor([ True, False]))
        >>> history.nbytes
        48
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        lag: int = 3,
        momentum: float | None = None,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
    ) -> None:
        if dtype not in DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if momentum is not None and dtype == torch.bfloat16:
            raise InvalidArgumentError(
                f"momentum={momentum} and dtype=torch.bfloat16 exclude each other: a mean moves by less than its "
                "precision, and would stand still; take torch.float16"
            )
        self.dtype = dtype
        super().__init__(
            num_samples,
            num_classes,
            row_bytes=dtype.itemsize * check_integer("num_classes", num_classes, least=2),
            lag=lag,
            momentum=momentum,
            path=path,
            location=location,
            sharing=sharing,
        )

    def encode(self, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.encode`."""
        whole = logits.isfinite().all(dim=1)
        if self.dtype.itemsize == 2:
            logits = logits.float()
            logits = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min)
        row = logits.to(self.dtype)
        whole = whole & row.isfinite().all(dim=1)
        return row.where(whole[:, None], 0).contiguous().view(torch.uint8), whole

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `History.decode`."""
        return from_bytes(rows, self.dtype)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.compare`."""
        return logits, self.decode(rows, epoch, logits)

    def describe(self) -> dict[str, Any]:
        """See `History.describe`."""
        return {**self._shape(), "dtype": str(self.dtype).removeprefix("torch.")}
