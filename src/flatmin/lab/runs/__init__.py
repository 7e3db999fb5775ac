"""One run on disk: its folder, its checkpoints, how it is resumed, and what is measured of it."""

from .after import RunAfter as RunAfter
from .after import measure_after as measure_after
from .landscape import RunLandscape as RunLandscape
from .landscape import measure_landscape as measure_landscape
from .saved import Saved as Saved
from .saved import open_saved as open_saved
from .sharpness import RunSharpness as RunSharpness
from .sharpness import measure_sharpness as measure_sharpness

__all__ = [
    "RunAfter",
    "RunLandscape",
    "RunSharpness",
    "Saved",
    "measure_after",
    "measure_landscape",
    "measure_sharpness",
    "open_saved",
]
