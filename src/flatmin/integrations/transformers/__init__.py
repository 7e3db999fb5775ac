"""A mixin for the Trainer of transformers, and those made of it: SAM and its family, SAF and MESA."""

from . import _package

_package.check_package()

from ._sharpness import Sharpness as Sharpness  # noqa: E402  # without the package: a sentence

__all__ = ["Sharpness"]
