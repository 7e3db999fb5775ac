"""Averages of a network's weights along its training, to evaluate in its place, or as the target of MESA."""

from ._average import ema_decay as ema_decay
from ._base import WeightAverage as WeightAverage
from ._ema import EMA as EMA
from ._lawa import LAWA as LAWA
from ._switch_ema import SwitchEMA as SwitchEMA

__all__ = ["EMA", "LAWA", "SwitchEMA", "WeightAverage", "ema_decay"]
