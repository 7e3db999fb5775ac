"""What the codecs share in turning logits into bytes."""

import torch
from torch import Tensor

# Logits further below the largest of their row than this are moved up to there: at the paper's temperature, 5, their
# share is e^-20. A class masked out with -1e9 then does not take the precision of all others.
RANGE = 100.0
OUT_OF_RANGE = 1e6  # how far below the largest a codec puts such logits when it decodes them: no share at all


def within_range(logits: Tensor) -> Tensor:
    """Logits, float32, shape (B, C), with the row's largest at 0 and none below ``-RANGE``."""
    return (logits - logits.amax(dim=1, keepdim=True)).clamp(min=-RANGE)


def nonzero(step: Tensor) -> Tensor:
    """Steps to divide by: that of a flat row, 0, becomes 1."""
    return step.where(step > 0, 1)


def from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Reads bytes, uint8, shape (B, n), as numbers, shape (B, n / itemsize)."""
    # contiguous() would leave a single row as it is, at an offset at which torch reads no larger numbers.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
