"""One run on disk: its folder, its checkpoints, how it is resumed, and what is measured of it."""

from .measure import RunLandscape as RunLandscape
from .measure import RunSharpness as RunSharpness
from .measure import measure_landscape as measure_landscape
from .measure import measure_sharpness as measure_sharpness
from .saved import Saved as Saved
from .saved import open_saved as open_saved

__all__ = ["RunLandscape", "RunSharpness", "Saved", "measure_landscape", "measure_sharpness", "open_saved"]
