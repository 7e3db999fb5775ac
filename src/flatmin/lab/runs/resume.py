"""What a run is continued from: its configuration, its experiment file, its newest intact checkpoint."""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ... import _distributed
from ..._checks import check_integer
from ...errors import DataError, ExperimentError, FlatminError, OutputError
from ..methods import get_method, resolve_settings
from ..problems.load import import_experiment
from ..recipe import Recipe, Run
from ..results import BEST, CONFIG, EXPERIMENT, LAST, PREVIOUS, RUNS
from ..training.progress import Progress
from .checkpoint import STATE, load_checkpoint, settle

# Fields of the recipe that may change when a run is continued: where it trains, not what.
PLACE = ("experiment", "device", "workers")


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
        if (here / CONFIG).is_file():
            return here, None
        folder = here.parent.parent
        known = here in [folder / name for name in (LAST, PREVIOUS, BEST)]  # or as a crash left it
        if (known or (here / STATE).is_file()) and (folder / CONFIG).is_file():
            return folder, here
    raise DataError(f"{path}: no run there to continue: neither {CONFIG} of a run nor a checkpoint in a run's folder")


def read_run(folder: Path) -> Run:
    """Reads the run in a folder, with its experiment file or, if that is gone, the copy of it.

    Raises:
        DataError: If its configuration is damaged.
        ExperimentError: If the experiment file has changed since, or cannot be run.
    """
    path = folder / CONFIG
    try:
        content = path.read_text()
        if not content:
            raise DataError(f"{path} is empty: the run ended before training began; remove {folder} and start anew")
        values = json.loads(content)
        if "rows" in values:
            raise DataError(f"{folder} is a comparison, which cannot be continued; its runs are in {folder / RUNS}")
        run = Run.from_json(values)
        recipe = run.recipe
        check_integer("seed", run.seed, least=0)
        if recipe.experiment is not None:
            recipe = dataclasses.replace(recipe, experiment=_experiment(folder, Path(recipe.experiment)))
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
    if _distributed.rank() == 0:  # the others come after it, when it may be writing already
        for path in every:
            try:
                settle(path)
            except OSError as error:
                raise OutputError(f"{path}: cannot be given its name: {error}") from error
    found = [path for path in every if path.exists()]
    checkpoint = wanted or next(iter(found), None)
    if checkpoint is None:
        return None
    try:
        state = load_checkpoint(checkpoint)
        _check(checkpoint, state, run)
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


def _experiment(folder: Path, original: Path) -> str:
    copy = folder / EXPERIMENT
    if not original.is_file():
        return str(copy)
    try:
        same = original.read_bytes() == copy.read_bytes()
    except OSError as error:
        raise ExperimentError(f"{original} cannot be compared with its copy {copy}: {error.strerror}") from error
    if not same:
        raise ExperimentError(
            f"{original} has changed since the run began; its copy {copy} has not: start a new run with the changed "
            "file, or put the copy in its place"
        )
    return str(original)


def _check(path: Path, state: Any, run: Run) -> None:
    """Checks the part of a state that the trainer does not check."""
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
