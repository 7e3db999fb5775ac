"""The names of the files that flatmin leaves."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...errors import InvalidArgumentError

CONFIG = "config.json"  # of a run or a comparison: its recipe, versions and hardware
METRICS = "metrics.jsonl"  # of a run: a line an epoch
EXPERIMENT = "experiment.py"  # the copy of the experiment file that a run was begun with
SHARPNESS = "sharpness.json"  # measures of a run's network
LANDSCAPE = "landscape.json"  # the loss around a run's network
AFTER_FILE = "after.json"  # what is left of a run's network after rounding, noise and a fine-tune
LAST = "checkpoints/last"  # of a run, as are the next two
PREVIOUS = "checkpoints/previous"  # the one before the last
BEST = "checkpoints/best"  # that of the best epoch
RESULTS = "results.json"  # of a comparison: its rows
REPORT = "report.html"  # of a comparison: the page for the browser
RUNS = "runs"  # of a comparison: the folder of its runs
SELECTION = "selection"  # of a comparison: the folder of the runs that settings were chosen by


def check_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Returns a path that there can be, whether or not something is there.

    Raises:
        InvalidArgumentError: (a ValueError) if it is empty, too long, or nothing that names a file.
    """
    try:
        text = os.fspath(value)
        if not text:
            raise InvalidArgumentError(f"{name} is empty; name a file or a folder, . for this one")
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(text)
        return Path(text)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(f"{name} must be a file or folder, got {value!r:.80}: {reason}") from error


def run_name(label: str, seed: int) -> str:
    """The folder's name of a row's run.

    Example:
        >>> from flatmin.lab.results import run_name
        >>> run_name("saf lag=2", 0)
        'saf-lag=2-seed0'
    """
    return f"{label.replace(' ', '-')}-seed{seed}"


def parse_run_name(name: str, labels: Iterable[str]) -> tuple[str, int] | None:
    """The label and the seed of a run's folder; None if it belongs to none of these rows.

    Example:
        >>> from flatmin.lab.results import parse_run_name
        >>> parse_run_name("saf-lag=2-seed0", ["base", "saf lag=2"])
        ('saf lag=2', 0)
    """
    start, _, seed = name.rpartition("-seed")
    found = [label for label in labels if label.replace(" ", "-") == start]
    return (found[0], int(seed)) if found and seed.isdecimal() else None
