"""From the files that flatmin writes to what a report knows.

A comparison is a folder with ``config.json``, ``results.json`` and ``runs/LABEL-seedN/``, or a results file alone; a
run is a folder with ``config.json`` and ``metrics.jsonl``. A comparison that was killed has no results; its runs are
read.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from ._study import Interval, Json, Row, Run, Study, number, numbers
from ._verdict import MANY, plain_verdict, run_verdict

CONFIG, RESULTS, METRICS, RUNS = "config.json", "results.json", "metrics.jsonl", "runs"


def read_studies(sources: Sequence[Path]) -> list[Study]:
    """Reads comparisons and runs; single runs of one data set and network become one study together.

    Raises:
        DataError: If a file or folder is missing, empty, damaged or not flatmin's.
    """
    studies: list[Study] = []
    single: dict[str, list[tuple[Path, Json]]] = {}
    for source in sources:
        if source.is_file() and not (source.name == RESULTS and (source.parent / CONFIG).exists()):
            studies.append(_comparison(source, _object(source), None))
            continue
        folder = source.parent if source.is_file() else source
        if not folder.is_dir():
            raise DataError(f"{source}: there is no such file or folder")
        results, config = folder / RESULTS, folder / CONFIG
        if not results.exists() and not config.exists():
            raise DataError(
                f"{source}: is no run of flatmin: it has neither {RESULTS} nor {CONFIG}; give the folder that "
                "`flatmin compare` or `flatmin train` wrote"
            )
        settings = _object(config) if config.exists() else {}
        if results.exists() or "rows" in settings:
            found = _object(results) if results.exists() else settings
            studies.append(_comparison(results if results.exists() else config, found, folder))
        elif isinstance(settings.get("recipe"), dict) and isinstance(settings.get("method"), str):
            single.setdefault(_title(settings["recipe"]), []).append((folder, settings))
        else:
            raise DataError(f"{config}: is no configuration of flatmin's: it names no method and no recipe")
    return studies + [_runs(title, found) for title, found in single.items()]


def _comparison(path: Path, found: Json, folder: Path | None) -> Study:
    rows, recipe = found.get("rows"), found.get("recipe")
    if not (isinstance(rows, list) and rows and isinstance(recipe, dict)):
        raise DataError(f"{path}: holds no comparison of flatmin's (rows and recipe are missing)")
    if not all(isinstance(row, dict) and isinstance(row.get("label"), str) for row in rows):
        raise DataError(f"{path}: is damaged: a row has no label")
    made = [_row(row) for row in rows]
    labels = [row.label for row in made]
    if len(set(labels)) != len(labels):
        raise DataError(f"{path}: is damaged: two rows have one label")
    runs = _find_runs(folder / RUNS, labels) if folder is not None else []
    notes = []
    if path.name == CONFIG:
        notes.append(f"The comparison has not come to its end: there is no {RESULTS}, so no interval and no verdict.")
        made = [_from_runs(row, [run for run in runs if run.label == row.label]) for row in made]
    if found.get("interrupted"):
        notes.append("The comparison was interrupted; what follows is of the seeds that every method had finished.")
    partial = found.get("partial")
    if isinstance(partial, dict) and any(partial.values()):
        some = sorted({str(seed) for by_seed in partial.values() if isinstance(by_seed, dict) for seed in by_seed})
        notes.append(f"Not every method finished seed {', '.join(some)}; that is left out.")
    seeds = [int(seed) for seed in numbers(found.get("seeds")) if seed is not None]
    verdict = found.get("verdict")
    study = Study(
        _title(recipe), folder.resolve().name if folder else path.stem, True, made, runs, seeds, "", notes, recipe,
        **_provenance(found),
    )  # fmt: skip
    return replace(
        study, verdict=verdict if isinstance(verdict, str) and len(made) - 1 <= MANY else plain_verdict(study)
    )


def _row(values: Json) -> Row:
    def interval(name: str) -> Interval | None:
        given = values.get(name)
        mean = number(given.get("mean")) if isinstance(given, dict) else None
        return None if mean is None else Interval(mean, number(given.get("half")))  # type: ignore[union-attr]

    return Row(
        values["label"],
        str(values.get("method", "")),
        values["settings"] if isinstance(values.get("settings"), dict) else {},
        [value for value in numbers(values.get("test_accuracy")) if value is not None],
        interval("accuracy"),
        interval("difference"),
        number(values.get("p_value_holm")),
        *(number(values.get(name)) for name in ("step_ratio", "step_seconds", "extra_bytes")),
    )


def _from_runs(row: Row, runs: Sequence[Run]) -> Row:
    """A row with the accuracies of its runs' last epochs, which have no interval."""
    last = [number(run.metrics[-1].get("test_accuracy")) for run in runs if run.metrics]
    found = [100 * value for value in last if value is not None]
    return replace(row, accuracies=found, accuracy=Interval(sum(found) / len(found), None) if found else None)


def _find_runs(folder: Path, labels: Sequence[str]) -> list[Run]:
    names = {label.replace(" ", "-"): label for label in labels}
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name, _, seed = path.name.rpartition("-seed")
        if name in names and seed.isdecimal():
            found.append(_run(path, names[name], int(seed)))
    return found


def _runs(title: str, found: Sequence[tuple[Path, Json]]) -> Study:
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
        title, found[0][0].resolve().name, False, rows, runs, sorted({run.seed for run in runs}), "", [],
        config["recipe"], **_provenance(config),
    )  # fmt: skip
    return replace(study, verdict=run_verdict(study))


def _run(folder: Path, label: str, seed: int) -> Run:
    metrics = []
    path = folder / METRICS
    if path.exists():
        lines = _text(path).split("\n")
        for place, line in enumerate(lines[:-1]):  # what follows the last newline is still being written
            metrics.append(_parse(line, f"{path}, line {place + 1}"))
    sharpness = folder / "sharpness.json"
    return Run(
        label,
        seed,
        metrics,
        _object(sharpness) if sharpness.exists() else None,
        [_object(each) for each in sorted(folder.glob("landscape*.json"))],
    )


def _provenance(values: Json) -> dict[str, Any]:
    return {
        "command": values["command"] if isinstance(values.get("command"), str) else "",
        **{name: values[name] if isinstance(values.get(name), dict) else {} for name in ("versions", "hardware")},
    }


def _title(recipe: Json) -> str:
    return str(recipe.get("experiment") or f"{recipe.get('data', '?')}, {recipe.get('model', '?')}")


def _object(path: Path) -> dict[str, Any]:
    return _parse(_text(path), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=lambda _: None)  # NaN and the infinite
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is damaged, it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is none of flatmin's files: it holds no JSON object")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is none of flatmin's files: it is no text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
