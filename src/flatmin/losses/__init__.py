"""Losses to add to the criterion: SAF, MESA, logit squeezing and online label smoothing."""

from ._mesa import MESA as MESA
from ._online_smoothing import OnlineLabelSmoothing as OnlineLabelSmoothing
from ._saf import SAF as SAF
from ._squeezing import logit_squeezing as logit_squeezing
from ._trajectory import binary_trajectory_loss as binary_trajectory_loss
from ._trajectory import feature_distance as feature_distance
from ._trajectory import trajectory_loss as trajectory_loss

__all__ = [
    "MESA",
    "OnlineLabelSmoothing",
    "SAF",
    "binary_trajectory_loss",
    "feature_distance",
    "logit_squeezing",
    "trajectory_loss",
]
