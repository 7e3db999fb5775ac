"""Sharpness and landscapes of a comparison's runs, for its report."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..._files import read_json
from ...errors import DataError, FlatminWarning
from ..results import LANDSCAPE, SHARPNESS
from ..runs.landscape import write_landscape
from ..runs.saved import open_saved
from ..runs.sharpness import write_sharpness
from ..training.logged_sharpness import fixed_batches

LOOKED_AT = 512  # training samples on which they are measured

OnProgress = Callable[[int, int, str], None]


def look_at(folders: Sequence[Path], points: int, tell: OnProgress, *, trusted: bool) -> None:
    """Measures sharpness and landscape of each run's network, for the report; those that are there are kept.

    Args:
        folders: Of the runs.
        points: Of the landscape, along each direction.
        tell: Called with points done, points planned and a word on what is going on.
        trusted: Whether the folders were made by this comparison, so that an experiment file in them is its own.
    """
    density = {"probes": 1, "steps": 32}  # rough
    try:
        for folder in folders:
            sharp, around = (folder / SHARPNESS).exists(), _points(folder) == points
            if sharp and around:
                continue
            tell(0, 0, f"sharpness of {folder.name}")
            saved = open_saved(folder, trust_experiment=trusted)
            batches = fixed_batches(saved.problem, LOOKED_AT, 0, saved.device)
            if not sharp:
                write_sharpness(saved, batches, density=density)
            if not around:
                write_landscape(saved, batches, points=points, on_progress=tell)
    except KeyboardInterrupt:
        warnings.warn(
            "interrupted while measuring sharpness and landscapes; the comparison itself is complete, kept in "
            f"{folders[0].parent.parent}, and the same comparison there goes on with them",
            FlatminWarning,
            stacklevel=2,
        )


def _points(folder: Path) -> int | None:
    """Of how many points along each direction a run's landscape is; None if it has none."""
    try:
        found = read_json(folder / LANDSCAPE)
    except DataError:
        return None
    x, y = found.get("x"), found.get("y")
    return len(x) if isinstance(x, list) and isinstance(y, list) else None
