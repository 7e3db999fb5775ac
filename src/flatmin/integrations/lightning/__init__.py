"""Callbacks for Lightning's Trainer: SAM and its family, SAF and MESA around a LightningModule that stays as it is."""

from . import _package

_package.check_package()

from ._sharpness import SharpnessAware as SharpnessAware  # noqa: E402  # without the package: a sentence
from ._trajectory import TrajectoryLoss as TrajectoryLoss  # noqa: E402

__all__ = ["SharpnessAware", "TrajectoryLoss"]
