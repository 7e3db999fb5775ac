"""Every logit of every sample, rounded to a few bits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import shown
from ..errors import InvalidArgumentError
from ._codec import Codec
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
    """Undoes `quantize` up to a constant: the row's largest logit is at 0; float32, shape (B, C)."""
    codes, step = unpack(codes, bits, num_classes), step.float()[:, None]
    # A logit that was out of range gets no probability at all, as the current one has none there.
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
    """Column 0 of every group of ``size``, column 1, and so on; the last group is filled up with zeros."""
    rows = F.pad(rows, (0, -rows.shape[1] % size))
    return tuple(rows[:, position::size] for position in range(size))


class Quantized(Codec):
    """Keeps all ``C`` logits of a row in ``bits`` bits each, with the step of the row: ``C * bits / 8 + 2`` bytes.

    Args:
        bits: 8, 6 or 4.

    Raises:
        InvalidArgumentError: If ``bits`` is another number, or too few for a running mean.

    Example:
        >>> from flatmin.history import History, Quantized
        >>> History(Quantized(bits=6), num_samples=50_000, num_classes=100).row_bytes
        77
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if not isinstance(bits, int) or bits not in (8, 6, 4):
            raise InvalidArgumentError(f"bits must be 8, 6 or 4, got {shown(bits)}")
        self.bits = bits

    def prepare(self) -> int:
        """See `Codec.prepare`."""
        if self.momentum is not None and self.bits < 8:
            raise InvalidArgumentError(
                f"momentum={self.momentum} and bits={self.bits} exclude each other: a running mean moves by less than "
                "a step of so few bits and would stand still; take 8"
            )
        return -(-self.num_classes * self.bits // 8) + 2

    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Codec.encode`."""
        logits = logits.float()
        finite = logits.isfinite().all(dim=1)
        codes, step = quantize(logits.where(finite[:, None], 0), self.bits)
        return torch.cat([codes, step[:, None].view(torch.uint8)], dim=1), finite

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `Codec.decode`."""
        codes, step = torch.split(rows, [self.row_bytes - 2, 2], dim=1)
        return dequantize(codes, from_bytes(step, torch.float16).flatten(), self.bits, self.num_classes)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `Codec.compare`."""
        return logits, self.decode(rows, epoch, logits)

    def describe(self) -> dict[str, Any]:
        """See `Codec.describe`."""
        return {"bits": self.bits}
