"""timm: flatmin's optimizers in its registry, MESA in its tasks, and the settings with which backbones were trained."""

from ._presets import PRESETS as PRESETS
from ._presets import Preset as Preset
from ._presets import preset as preset
from ._register import register as register
from ._task import MESATask as MESATask

__all__ = ["MESATask", "PRESETS", "Preset", "preset", "register"]
