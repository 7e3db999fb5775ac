"""DP-SAT, sharpness-aware training with differential privacy, attached to Opacus' optimizer and module."""

from . import _package

_package.check_package()

from ._dpsat import DPSAT as DPSAT  # noqa: E402  # without the package: a sentence

__all__ = ["DPSAT"]
