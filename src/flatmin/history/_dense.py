"""Every logit of every sample, as the paper keeps them, or in half precision."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_one_of
from ..errors import InvalidArgumentError
from ._codec import Codec
from ._rows import from_bytes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Dense(Codec):
    """Keeps all ``C`` logits of a row: ``4 C`` bytes in float32, ``2 C`` in float16.

    In 16 bits the row's largest logit is subtracted first, which changes no softmax. The likely classes, near 0, are
    then kept most precisely.

    Args:
        dtype: ``torch.float32``, ``float16``, ``bfloat16`` or ``float64``.

    Raises:
        InvalidArgumentError: If ``dtype`` is another, or too coarse for a running mean.

    Example:
        >>> import torch
        >>> from flatmin.history import Dense, History
        >>> history = History(Dense(torch.float16), num_samples=50_000, num_classes=100)
        >>> history.row_bytes
        200
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = check_one_of("dtype", dtype, DTYPES, f"one of {', '.join(map(str, DTYPES))}")

    def prepare(self) -> int:
        """See `Codec.prepare`."""
        if self.momentum is not None and self.dtype == torch.bfloat16:
            raise InvalidArgumentError(
                f"momentum={self.momentum} and dtype=torch.bfloat16 exclude each other: a running mean moves by less "
                "than bfloat16's precision and would stand still; take torch.float16"
            )
        return self.dtype.itemsize * self.num_classes

    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Codec.encode`."""
        finite = logits.isfinite().all(dim=1)
        if self.dtype.itemsize == 2:
            logits = logits.float()
            logits = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min)
        row = logits.to(self.dtype)
        finite = finite & row.isfinite().all(dim=1)
        return row.where(finite[:, None], 0).contiguous().view(torch.uint8), finite

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return from_bytes(rows, self.dtype)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `Codec.compare`."""
        return logits, self.decode(rows, epoch, logits)

    def describe(self) -> dict[str, Any]:
        """See `Codec.describe`."""
        return {"dtype": str(self.dtype).removeprefix("torch.")}
