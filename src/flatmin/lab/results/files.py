"""The names of the files that flatmin leaves."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...errors import InvalidArgumentError

CONFIG, METRICS, EXPERIMENT = "config.json", "metrics.jsonl", "experiment.py"
SHARPNESS, LANDSCAPE, AFTER_FILE = "sharpness.json", "landscape.json", "after.json"
LAST, PREVIOUS, BEST = "checkpoints/last", "checkpoints/previous", "checkpoints/best"
RESULTS, REPORT, RUNS, SELECTION = "results.json", "report.html", "runs", "selection"


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
