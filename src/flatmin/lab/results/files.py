"""The names of the files that flatmin leaves, and reading them."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import DataError, InvalidArgumentError

CONFIG, METRICS, EXPERIMENT = "config.json", "metrics.jsonl", "experiment.py"
SHARPNESS, LANDSCAPE = "sharpness.json", "landscape.json"
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


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        DataError: If it cannot be read, or holds something else.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Reads a JSON object; numbers that are not finite become None.

    Args:
        text: The JSON.
        where: The file, for the error.

    Raises:
        DataError: If it is something else.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is damaged, it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a file of flatmin: it holds no JSON object")
    return value


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        DataError: If it cannot be read, or holds something else.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a file of flatmin: it is no text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
