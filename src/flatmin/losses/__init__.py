"""Losses that are added to the criterion."""

from ._average import ema_decay as ema_decay
from ._mesa import MESA as MESA
from ._saf import SAF as SAF
from ._trajectory import trajectory_loss as trajectory_loss

__all__ = ["MESA", "SAF", "ema_decay", "trajectory_loss"]
