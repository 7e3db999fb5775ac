"""Losses that are added to the criterion."""

from ._mesa import MESA as MESA
from ._online_smoothing import OnlineLabelSmoothing as OnlineLabelSmoothing
from ._saf import SAF as SAF
from ._squeezing import logit_squeezing as logit_squeezing
from ._trajectory import trajectory_loss as trajectory_loss

__all__ = ["MESA", "OnlineLabelSmoothing", "SAF", "logit_squeezing", "trajectory_loss"]
