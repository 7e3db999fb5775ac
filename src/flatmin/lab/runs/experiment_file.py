"""Which experiment file a saved run is measured or continued with: unchanged, and nobody's code without a question."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..._files import LARGEST_SETUP, read_bytes, read_json
from ...errors import DataError, ExperimentError
from ..results import CONFIG, EXPERIMENT, RUNS, SELECTION

DIGEST = "experiment_digest"  # in config.json


def digest_of(experiment: bytes) -> str:
    """What tells an experiment file from others, and from itself when it has changed."""
    return hashlib.sha256(experiment).hexdigest()


def choose_experiment(folder: Path, named: Path, digest: Any, *, trusted: bool) -> Path:
    """The experiment file of a run that is to be run again: the one that was named or, if that is gone, its copy.

    Args:
        folder: The run's.
        named: The file that the run was begun with.
        digest: Its digest then, from the configuration; without one, the copy's.
        trusted: Whether a file that lies in the folder of the run, or of its comparison, may be run.

    Raises:
        ExperimentError: If the file has changed since, cannot be read, or is not trusted.
    """
    copy = folder / EXPERIMENT
    there = os.path.lexists(named)
    own = there and not _came_with(folder, named)
    file = named if there else copy
    found, kept = _digest(file, follow=own), _digest(copy)
    began = digest if isinstance(digest, str) else kept
    if found != began:
        way_out = (
            f"; its copy {copy} has not: start a new run with the changed file, or put the copy in its place"
            if kept == began
            else ": start a new run with it, or put the unchanged file in its place"
        )
        raise ExperimentError(
            f"{file} has changed since the run began (its digest was {began:.12} and is {found:.12}){way_out}"
        )
    if not (own or trusted):
        gone = "" if there else f"{named!s:.200} is not there; "
        raise ExperimentError(
            f"{gone}{file} came with the run, and going on would run its code: read it and, if you trust it, give "
            "--trust-experiment (in Python trust_experiment=True)"
        )
    return file


def _digest(file: Path, *, follow: bool = False) -> str:
    try:
        return digest_of(read_bytes(file, most=LARGEST_SETUP, follow=follow))
    except DataError as error:
        raise ExperimentError(f"the experiment file of the run cannot be compared: {error}") from error


def _came_with(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder of the run, or of the comparison that the run is part of."""
    try:
        home = folder.resolve()
        if home.parent.name == RUNS and _is_comparison(home.parent.parent):
            home = home.parent.parent
            home = home.parent if home.name == SELECTION else home
        return file.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # of links that go round in circles
        return True


def _is_comparison(folder: Path) -> bool:
    with suppress(DataError):
        return "rows" in read_json(folder / CONFIG, most=LARGEST_SETUP)
    return False
