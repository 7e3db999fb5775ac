"""What a run is continued from: its configuration, its experiment file, its newest intact checkpoint."""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ... import _distributed
from ..._checks import check_integer
from ..._files import LARGEST_SETUP, read_text
from ...errors import DataError, ExperimentError, FlatminError, OutputError
from ..methods import get_method, resolve_settings
from ..problems.load import import_experiment
from ..recipe import Recipe, Run
from ..results import BEST, CONFIG, LAST, PREVIOUS, RUNS
from ..training.progress import Progress
from .checkpoint import STATE, check_folders, load_checkpoint, settle
from .experiment_file import DIGEST, choose_experiment

# Fields of the recipe that may change when a run is continued: where it trains, not what.
PLACE = ("experiment", "device", "workers")


CHECKED = ("run", "metrics", "epoch", "progress", "extra_bytes")


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run is continued from, from `RunWriter.gather`."""

    checkpoint: Path
    state: dict[str, Any]


def find_run(path: Path) -> tuple[Path, Path | None]:
    """Returns the folder of a run, and the checkpoint if ``path`` is one; otherwise None, for the newest.

    Raises:
        DataError: If ``path`` is neither.
    """
    paths = [Path(path)]
    with suppress(OSError, RuntimeError):  # of links that go round in circles
        paths.append(paths[0].resolve())
    for here in paths:
        if os.path.lexists(here / CONFIG):
            return here, None
        folder = here.parent.parent
        known = here in [folder / name for name in (LAST, PREVIOUS, BEST)]  # or as a crash left it
        if (known or os.path.lexists(here / STATE)) and os.path.lexists(folder / CONFIG):
            return folder, here
    raise DataError(f"{path}: no run there to continue: neither {CONFIG} of a run nor a checkpoint in a run's folder")


def read_run(folder: Path, *, trust_experiment: bool = False) -> Run:
    """Reads the run in a folder, and runs its experiment file or, if that is gone, the copy of it.

    Args:
        folder: The run's.
        trust_experiment: Whether a file that lies in the folder itself, as the copy does, may be run: where the folder
            is somebody else's, so is the code.

    Raises:
        DataError: If its configuration is damaged.
        ExperimentError: If the experiment file has changed since, is not to be trusted, or cannot be run.
    """
    path = folder / CONFIG
    try:
        content = read_text(path, most=LARGEST_SETUP)
        if not content:
            raise DataError(f"{path} is empty: the run ended before training began; remove {folder} and start anew")
        values = json.loads(content)
        if "rows" in values:
            raise DataError(
                f"{folder} is a comparison, which goes on by the same flatmin compare with this folder as --out; its "
                f"runs are in {folder / RUNS}"
            )
        run = Run.from_json(values)
        recipe = run.recipe
        check_integer("seed", run.seed, least=0)
        if recipe.experiment is not None:
            file = choose_experiment(folder, Path(recipe.experiment), values.get(DIGEST), trusted=trust_experiment)
            recipe = dataclasses.replace(recipe, experiment=str(file))
        import_experiment(recipe)  # which may register the method
        settings = resolve_settings(get_method(run.method), run.settings, epochs=recipe.epochs)
    except (DataError, ExperimentError):
        raise
    except Exception as error:  # not JSON, not readable, keys or types that are not those of a run
        what = str(error) if isinstance(error, FlatminError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not the configuration of a run: {what:.200}") from error
    return dataclasses.replace(run, recipe=recipe, settings=settings)


def open_start(folder: Path, wanted: Path | None, run: Run) -> Start | None:
    """Reads the checkpoint that a run is continued from, and repairs what a crash has left half done.

    Args:
        folder: The run's.
        wanted: One of its checkpoints; None for the newest.
        run: The run that it must belong to.

    Returns:
        The checkpoint; None if there is none yet.

    Raises:
        DataError: If it is damaged or of another run; the message says which others there are.
    """
    every = [folder / name for name in (LAST, PREVIOUS, BEST)]
    check_folders(every[0].parent, *every)
    if _distributed.rank() == 0:  # the others come after it, when it may be writing already
        for path in every:
            try:
                settle(path)
            except OSError as error:
                raise OutputError(f"{path}: cannot be given its name: {error}") from error
    found = [path for path in every if os.path.lexists(path)]
    checkpoint = wanted or next(iter(found), None)
    if checkpoint is None:
        return None
    try:
        state = load_checkpoint(checkpoint)
        check_state(checkpoint, state, run)
    except DataError as error:
        raise DataError(f"{error}; {_others(checkpoint, found)}") from error
    return Start(checkpoint, state)


def describe_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Says in which values a checkpoint and a run differ; empty if in none."""
    return ", ".join(
        f"{name} was {found.get(name)!r:.60} and is {wanted.get(name)!r:.60}"
        for name in dict.fromkeys((*wanted, *found))
        if found.get(name) != wanted.get(name)
    )


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, unread; None if there is none yet."""
    return next((folder / name for name in (LAST, PREVIOUS, BEST) if os.path.lexists(folder / name)), None)


def check_state(path: Path, state: Any, run: Run) -> None:
    """Checks the entries `CHECKED` of a checkpoint's state, which the trainer does not check: that it is of this run.

    Raises:
        DataError: If it is of another, or damaged.
    """
    try:
        metrics, epoch = state["metrics"], state["epoch"]
        complete = check_integer("epoch", epoch, least=0) == len(metrics) <= run.recipe.epochs and all(
            line["epoch"] == number
            and isinstance(line["test_accuracy"], float)
            and isinstance(line["closure_calls"], float)
            and _numbers(line.values())
            for number, line in enumerate(metrics)
        )
        if not complete:
            raise ValueError("its metrics do not match its epochs")
        Progress.from_state(state["progress"], torch.zeros(2))
        difference = describe_difference(_essence(state["run"]), _essence(run.to_json()))
        check_integer("extra_bytes", state["extra_bytes"], least=0)
    except Exception as error:
        what = str(error) if isinstance(error, (FlatminError, ValueError)) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a checkpoint of a run: {what:.200}") from error
    if difference:
        raise DataError(f"{path}: the checkpoint belongs to another run than {CONFIG}: {difference}")


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _essence(values: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must stay the same when a run is continued, by name."""
    # A field that was added later had its default before.
    recipe = {**dataclasses.asdict(Recipe()), **values["recipe"]}
    recipe = {name: value for name, value in recipe.items() if name not in PLACE}
    return {"method": values["method"], "seed": values["seed"], **recipe, **values["settings"]}


def _others(damaged: Path, found: list[Path]) -> str:
    """Says which other checkpoints are intact."""
    held = []
    for path in found:
        if path.resolve() != damaged.resolve():
            try:
                epoch = check_integer("epoch", load_checkpoint(path)["epoch"], least=0)
            except (DataError, KeyError, TypeError, ValueError):
                continue
            held.append(f"{path} holds epoch {epoch}: flatmin train --resume {shlex.quote(str(path))}")
    return "; ".join(held) if held else "there is no other intact checkpoint, so the run must be started anew"
