"""Every logit of every sample, rounded to a few bits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._base import History
from ._rows import OUT_OF_RANGE, RANGE, from_bytes, nonzero, within_range


def quantize(logits: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rounds each row to ``2**bits`` equal steps from its least to its largest logit.

    Args:
        logits: float32, shape (B, C).
        bits: 8, 6 or 4.

    Returns:
        Codes, uint8, shape (B, ceil(C * bits / 8)), and the step of each row, float16, shape (B,).
    """
    below = within_range(logits)
    step = (-below.amin(dim=1, keepdim=True) / (2**bits - 1)).half()
    codes = (-below / nonzero(step.float())).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return pack(codes, bits), step.squeeze(1)


def dequantize(codes: Tensor, step: Tensor, bits: int, num_classes: int) -> Tensor:
    """Undoes `quantize`, up to a constant: logits with the row's largest at 0, float32, shape (B, C)."""
    codes, step = unpack(codes, bits, num_classes), step.float()[:, None]
    # What was out of range has no share at all, as the present has none there.
    lost = (codes == 2**bits - 1) & (step >= RANGE / (2**bits - 1) * (1 - 2**-11))
    return (codes * -step).masked_fill(lost, -OUT_OF_RANGE)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Puts codes below ``2**bits``, uint8, shape (B, C), side by side in bytes, shape (B, ceil(C * bits / 8))."""
    if bits == 8:
        return codes
    if bits == 4:  # two in a byte
        a, b = _in_groups(codes, 2)
        return a | b << 4
    size = -(-codes.shape[1] * bits // 8)
    a, b, c, d = _in_groups(codes, 4)  # four in three bytes
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=2).flatten(1)[:, :size]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `pack` for ``count`` codes."""
    if bits == 8:
        return packed
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], dim=2)
    else:
        a, b, c = _in_groups(packed, 3)
        codes = torch.stack([a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2], dim=2)
    return codes.flatten(1)[:, :count]


def _in_groups(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """The first of every ``size`` columns, the second, and so on; zeros where the last group is not full."""
    rows = F.pad(rows, (0, -rows.shape[1] % size))
    return tuple(rows[:, place::size] for place in range(size))


class QuantizedHistory(History):
    """Keeps all ``C`` logits of a row in ``bits`` bits each, with the step of the row: ``C * bits / 8 + 2`` bytes.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        bits: 8, 6 or 4.
        lag: Number of epochs between writing and reading.
        momentum: See `History`.
        path: See `History`.
        location: See `History`.
        sharing: See `History`.

    Raises:
        InvalidArgumentError: If an argument is out of its bounds, or the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> from flatmin.history import QuantizedHistory
        >>> QuantizedHistory(num_samples=50_000, num_classes=100, bits=6).row_bytes
        77
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        bits: int = 8,
        lag: int = 3,
        momentum: float | None = None,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
    ) -> None:
        if bits not in (8, 6, 4) or not isinstance(bits, int):
            raise InvalidArgumentError(f"bits must be 8, 6 or 4, got {bits!r}")
        if momentum is not None and bits < 8:
            raise InvalidArgumentError(
                f"momentum={momentum} and bits={bits} exclude each other: a mean moves by less than a step of so few "
                "bits, and would stand still; take 8"
            )
        self.bits = bits
        codes = -(-check_integer("num_classes", num_classes, least=2) * bits // 8)
        super().__init__(
            num_samples,
            num_classes,
            row_bytes=codes + 2,
            lag=lag,
            momentum=momentum,
            path=path,
            location=location,
            sharing=sharing,
        )

    def encode(self, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.encode`."""
        logits = logits.float()
        whole = logits.isfinite().all(dim=1)
        codes, step = quantize(logits.where(whole[:, None], 0), self.bits)
        return torch.cat([codes, step[:, None].view(torch.uint8)], dim=1), whole

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `History.decode`."""
        codes, step = torch.split(rows, [self.row_bytes - 2, 2], dim=1)
        return dequantize(codes, from_bytes(step, torch.float16).flatten(), self.bits, self.num_classes)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.compare`."""
        return logits, self.decode(rows, epoch, logits)

    def describe(self) -> dict[str, Any]:
        """See `History.describe`."""
        return {**self._shape(), "bits": self.bits}
