"""Sharpness and landscapes of a comparison's runs, for its report."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import FlatminWarning
from ..runs.landscape import write_landscape
from ..runs.saved import open_saved
from ..runs.sharpness import write_sharpness
from ..training.logged_sharpness import fixed_batches

LOOKED_AT = 512  # training samples on which they are measured

OnProgress = Callable[[int, int, str], None]


def look_at(folders: Sequence[Path], points: int, tell: OnProgress) -> None:
    """Measures sharpness and landscape of each run's network, for the report."""
    density = {"probes": 1, "steps": 32}  # rough
    try:
        for folder in folders:
            tell(0, 0, f"sharpness of {folder.name}")
            saved = open_saved(folder, trust_experiment=True)  # its own
            batches = fixed_batches(saved.problem, LOOKED_AT, 0, saved.device)
            write_sharpness(saved, batches, density=density)
            write_landscape(saved, batches, points=points, on_progress=tell)
    except KeyboardInterrupt:
        warnings.warn(
            "interrupted while measuring sharpness and landscapes; the comparison itself is complete, kept in "
            f"{folders[0].parent.parent}",
            FlatminWarning,
            stacklevel=2,
        )
