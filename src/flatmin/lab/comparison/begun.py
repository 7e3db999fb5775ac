"""A comparison that was begun before: the same call with the same folder goes on with it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..._files import LARGEST_SETUP, locked, plain, read_json
from ...errors import DataError, OutputError
from ..recipe import Recipe
from ..results import CONFIG, Row
from ..runs.experiment_file import DIGEST, digest_of
from ..runs.folder import run_folder
from ..runs.resume import describe_difference
from ..runs.run import read_experiment


@dataclass(frozen=True)
class Begun:
    """What was begun.

    Attributes:
        rows: Those that are compared; of the candidates, the chosen ones.
        selection: How they were chosen, if they were.
    """

    rows: list[Row]
    selection: dict[str, Any] | None


def find_begun(
    folder: Path, recipe: Recipe, rows: Sequence[Row], *, seeds: int | None, select: int | None
) -> Begun | None:
    """The comparison in a folder, if it is the same one; None if there is none that can go on.

    Time, jobs and what is measured beside the accuracy may differ, for they change no run.

    Raises:
        OutputError: If it is another one.
    """
    try:
        config = read_json(folder / CONFIG, most=LARGEST_SETUP)
    except DataError:
        return None
    compared = config.get("rows")
    if not isinstance(compared, list) or not isinstance(config.get("recipe"), dict):
        return None
    selection = config.get("selection") if isinstance(config.get("selection"), dict) else None
    experiment = read_experiment(recipe)
    chosen = [row for row in rows if _json(row.setting_json()) in compared]
    candidates = [row.label for row in rows] if select is None else _contested(rows)
    wanted = {
        **_json(asdict(recipe)),
        "seeds": seeds,
        "select": select,
        "rows": candidates,
        "digest of the experiment file": None if experiment is None else digest_of(experiment),
    }
    found = {
        **config["recipe"],
        "seeds": config.get("seeds"),
        "select": selection and len(selection.get("seeds", [])),
        "rows": _labels(selection["candidates"] if selection else compared),
        "digest of the experiment file": config.get(DIGEST),
    }
    difference = describe_difference(found, wanted)
    if not difference and len(chosen) != len(compared):
        difference = "hyperparameters"
    if difference:
        raise OutputError(
            f"{folder}: holds another comparison ({difference}); go on with it by the same arguments, or give --out a "
            "new folder"
        )
    return Begun(chosen, selection)


@contextmanager
def comparison_folder(out: str | PathLike[str] | None, begun: Begun | None) -> Iterator[Path]:
    """The folder of a comparison: a new one, see `run_folder`, or that of one that goes on; for one process at a time.

    Raises:
        OutputError: If it cannot be made or written, is not empty, or another process is writing it.
    """
    if out is not None and begun is not None:
        with locked(Path(out)):
            yield Path(out)
    else:
        with run_folder(out, "compare") as folder, locked(folder):
            yield folder


def _json(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(plain(value)))


def _contested(rows: Sequence[Row]) -> list[str]:
    """The labels of rows that are chosen among: those of methods with several."""
    methods = [row.method for row in rows]
    return [row.label for row in rows if methods.count(row.method) > 1]


def _labels(rows: Any) -> list[Any]:
    return [row.get("label") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
