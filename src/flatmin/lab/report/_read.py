"""From the files that flatmin writes to what a report knows.

A comparison is a folder with ``config.json``, ``results.json`` and ``runs/LABEL-seedN/``, or a results file alone; a
run is a folder with ``config.json`` and ``metrics.jsonl``. A comparison that was killed has no results; its runs are
read.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..._files import LARGEST_SETUP, check_folder, parse_json, read_json, read_text
from ...errors import DataError
from ..results import (
    CONFIG,
    LANDSCAPE,
    METRICS,
    RESULTS,
    RUNS,
    SHARPNESS,
    ComparisonResult,
    Interval,
    Row,
    parse_run_name,
    verdict,
)
from ..results.comparison import title
from ..results.files import check_path
from ..results.values import is_diverged, number
from ._study import Json, Run, Study
from ._verdict import MANY, run_verdict


def read_studies(sources: Sequence[Path]) -> list[Study]:
    """Reads comparisons and runs; single runs of one data set and network become one study together.

    Raises:
        DataError: If a file or folder is missing, empty, damaged or not flatmin's.
    """
    studies: list[Study] = []
    single: dict[str, list[tuple[Path, Json]]] = {}
    for source in sources:
        check_path("runs", source)
        is_file = not source.is_dir()
        if not os.path.lexists(source):
            raise DataError(f"{source}: there is no such file or folder")
        if is_file and not (source.name == RESULTS and os.path.lexists(source.parent / CONFIG)):
            found = read_json(source, follow=True)
            if not isinstance(found.get("seeds"), list):  # which a configuration has as a number
                raise DataError(f"{source}: holds no results of a comparison; give its {RESULTS}, or its folder")
            studies.append(_comparison(source, found, None))
            continue
        folder = source.parent if is_file else source
        results, config = folder / RESULTS, folder / CONFIG
        has_results, has_config = os.path.lexists(results), os.path.lexists(config)
        if not has_results and not has_config:
            raise DataError(
                f"{source}: is no run of flatmin: it has neither {RESULTS} nor {CONFIG}; give the folder that "
                "`flatmin compare` or `flatmin train` wrote"
            )
        settings = read_json(config, most=LARGEST_SETUP) if has_config else {}
        if has_results or "rows" in settings:
            found = read_json(results) if has_results else settings
            studies.append(_comparison(results if has_results else config, found, folder))
        elif isinstance(settings.get("recipe"), dict) and isinstance(settings.get("method"), str):
            single.setdefault(title(settings["recipe"]), []).append((folder, settings))
        else:
            raise DataError(f"{config}: is no configuration of flatmin's: it names no method and no recipe")
    return studies + [_runs(heading, found) for heading, found in single.items()]


def _comparison(path: Path, found: Json, folder: Path | None) -> Study:
    result = ComparisonResult.from_json(found, str(path))
    rows = result.rows
    runs = _find_runs(folder / RUNS, [row.label for row in rows]) if folder is not None else []
    notes = []
    if path.name == CONFIG:
        notes.append(f"The comparison has not come to its end: there is no {RESULTS}, so no interval and no verdict.")
        rows = [_from_runs(row, [run for run in runs if run.label == row.label]) for row in rows]
    if result.interrupted:
        notes.append("The comparison was interrupted; what follows is of the seeds that every method had finished.")
    some = sorted({seed for by_seed in result.partial.values() for seed in by_seed})
    if some:
        notes.append(f"Not every method finished seed {', '.join(map(str, some))}; that is left out.")
    return Study(
        result.title,
        folder.resolve().name if folder else path.stem,
        True,
        rows,
        runs,
        result.seeds,
        result.verdict if len(rows) - 1 <= MANY else verdict(rows, len(result.seeds), most=MANY),
        notes,
        result.recipe,
        **_provenance(found),
    )


def _from_runs(row: Row, runs: Sequence[Run]) -> Row:
    """A row with the accuracies of its runs' last epochs, which have no interval."""
    last = [number(run.metrics[-1].get("test_accuracy")) for run in runs if run.metrics]
    found = [100 * value for value in last if value is not None]
    row = replace(row, test_accuracy=found, accuracy=Interval(sum(found) / len(found), None) if found else None)
    return row.with_diverged(sum(is_diverged(run.metrics[-1]) for run in runs if run.metrics))


def _find_runs(folder: Path, labels: Sequence[str]) -> list[Run]:
    found = []
    for path in sorted(folder.iterdir()) if _is_own_folder(folder) else []:
        named = parse_run_name(path.name, labels)
        if named is not None and _is_own_folder(path):
            found.append(_run(path, *named))
    return found


def _is_own_folder(path: Path) -> bool:
    """Whether there is such a folder.

    Raises:
        DataError: If it is a link, or no folder.
    """
    try:
        check_folder(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return True


def _runs(heading: str, found: Sequence[tuple[Path, Json]]) -> Study:
    """Runs trained one by one: those of one method with the same settings and recipe are seeds of one row."""
    groups: dict[str, list[tuple[Path, Json]]] = {}
    for folder, config in found:
        same = json.dumps([config["method"], config.get("settings"), config["recipe"]], sort_keys=True)
        groups.setdefault(same, []).append((folder, config))
    methods = [group[0][1]["method"] for group in groups.values()]
    rows: list[Row] = []
    runs: list[Run] = []
    for group in groups.values():
        folder, config = group[0]
        method = config["method"]
        label = method if methods.count(method) == 1 else f"{method} ({folder.resolve().name})"
        while any(row.label == label for row in rows):
            label += "'"
        mine = [_run(path, label, int(number(each.get("seed")) or 0)) for path, each in group]
        runs += mine
        settings = config.get("settings")
        rows.append(_from_runs(Row(label, method, settings if isinstance(settings, dict) else {}), mine))
    config = found[0][1]
    study = Study(
        heading, found[0][0].resolve().name, False, rows, runs, sorted({run.seed for run in runs}), "", [],
        config["recipe"], **_provenance(config),
    )  # fmt: skip
    return replace(study, verdict=run_verdict(study))


def _run(folder: Path, label: str, seed: int) -> Run:
    metrics = []
    path = folder / METRICS
    if os.path.lexists(path):
        lines = read_text(path).split("\n")
        for place, line in enumerate(lines[:-1]):  # what follows the last newline is still being written
            metrics.append(parse_json(line, f"{path}, line {place + 1}"))
    sharpness = folder / SHARPNESS
    return Run(
        label,
        seed,
        metrics,
        read_json(sharpness) if os.path.lexists(sharpness) else None,
        [read_json(each) for each in sorted(folder.glob(f"{Path(LANDSCAPE).stem}*.json"))],
    )


def _provenance(values: Json) -> dict[str, Any]:
    return {
        "command": values["command"] if isinstance(values.get("command"), str) else "",
        **{name: values[name] if isinstance(values.get(name), dict) else {} for name in ("versions", "hardware")},
    }
