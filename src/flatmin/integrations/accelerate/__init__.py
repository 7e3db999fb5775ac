"""SAM and its family in a loop with Accelerate: a step of all micro-batches that are accumulated."""

from . import _package

_package.check_package()

from ._step import sharpness_aware as sharpness_aware  # noqa: E402  # without the package: a sentence

__all__ = ["sharpness_aware"]
