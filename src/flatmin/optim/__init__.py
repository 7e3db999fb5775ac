"""Optimizers that move the weights before the gradient is taken."""

from ._base import SharpnessAware as SharpnessAware
from ._sam import SAM as SAM

__all__ = ["SAM", "SharpnessAware"]
