"""Loss landscapes: surfaces on one scale, slices, and how steep they are by distance."""

import math
from collections.abc import Sequence
from typing import Any

from ..results.values import number, numbers
from ._charts import Chart, Curves, Grid, Landscapes, Line, Table
from ._study import Json, Study
from ._words import say

_RINGS = 8  # distances at which the rise is averaged
_STEEP = 30.0  # of the highest to the middle loss: beyond, all are drawn on a logarithmic scale
_PLANE = "plane"


def landscape_charts(study: Study) -> list[Chart]:
    """Charts of each kind of landscape, of one seed: the lowest that most rows have."""
    charts: list[Chart] = []
    kinds = {"random": "around the minimum, over two random directions", _PLANE: "over the plane through checkpoints"}
    for kind, where in kinds.items():
        found = _of_one_seed(study, kind, flat=False)
        grids = [grid for grid in (_grid(label, place, values) for label, place, _, values in found) if grid]
        if grids:
            charts.append(_surfaces(kind, where, found[0][2], grids))
            if kind != _PLANE and (profiles := _profiles(found[0][2], grids)):
                charts.append(profiles)
        slices = _of_one_seed(study, kind, flat=True)
        lines = [line for line in (_slice(label, place, values) for label, place, _, values in slices) if line]
        if lines:
            charts.append(_sliced(kind, slices[0][2], lines))
    return charts


def _of_one_seed(study: Study, kind: str, *, flat: bool) -> list[tuple[str, int, int, Json]]:
    """Label, place, seed and content of the landscapes of a kind, ``flat`` if along a line only."""
    by_seed: dict[int, list[tuple[str, int, int, Json]]] = {}
    for place, row in enumerate(study.rows):
        for run in study.of(row):
            for values in run.landscapes:
                is_plane = values.get("kind") == _PLANE
                if is_plane == (kind == _PLANE) and (values.get("y") is None) == flat:
                    by_seed.setdefault(run.seed, []).append((row.label, place, run.seed, values))
                    break
    return max(by_seed.values(), key=len) if by_seed else []


def _grid(label: str, place: int, values: Json) -> Grid | None:
    x, y = numbers(values.get("x")), numbers(values.get("y"))
    raw = values.get("loss")
    loss = [numbers(row) for row in raw] if isinstance(raw, list) else []
    fits = len(loss) == len(y) > 1 and all(len(row) == len(x) > 1 for row in loss)
    if not fits or None in x or None in y or not any(value is not None for row in loss for value in row):
        return None
    return Grid(
        label,
        place,
        [value for value in x if value is not None],
        [value for value in y if value is not None],
        loss,
        _points(values.get("checkpoints")),
    )


def _points(given: Any) -> list[tuple[str, float, float]]:
    points = []
    for each in given if isinstance(given, list) else []:
        if isinstance(each, dict):
            x, y = number(each.get("x")), number(each.get("y"))
            if x is not None and y is not None:
                points.append((str(each.get("name", "")), x, y))
    return points


def _surfaces(kind: str, where: str, seed: int, grids: Sequence[Grid]) -> Landscapes:
    values = sorted(value for grid in grids for row in grid.loss for value in row if value is not None)
    log = values[0] > 0 and values[-1] > _STEEP * values[len(values) // 2]
    rows = []
    for grid in grids:
        losses = [value for row in grid.loss for value in row if value is not None]
        holes = sum(value is None for row in grid.loss for value in row)
        rows.append([grid.label, say(_at_centre(grid)), say(min(losses)), say(max(losses)), str(holes)])
    scale = " on a logarithmic scale" if log else ""
    return Landscapes(
        f"landscape-{kind}",
        "The loss " + where.partition(",")[0],
        f"The training loss {where}, seed {seed}. All share one scale{scale}, in height and in colour, so that "
        "steepness can be compared by eye. (The paper's Figures 2 and 5.)",
        "first direction",
        "second direction",
        Table(["method", "loss at the centre", "lowest", "highest", "points not finite"], rows),
        grids,
        values[0],
        values[-1],
        log,
    )


def _at_centre(grid: Grid) -> float | None:
    column = min(range(len(grid.x)), key=lambda place: abs(grid.x[place]))
    row = min(range(len(grid.y)), key=lambda place: abs(grid.y[place]))
    return grid.loss[row][column]


def _profiles(seed: int, grids: Sequence[Grid]) -> Curves | None:
    """The mean loss in rings about the centre, which turns a surface into one curve; None if all points are corners."""
    lines = []
    for grid in grids:
        reach = min(max(map(abs, grid.x)), max(map(abs, grid.y)))
        rings: list[list[float]] = [[] for _ in range(_RINGS + 1)]
        for y, row in zip(grid.y, grid.loss, strict=True):
            for x, loss in zip(grid.x, row, strict=True):
                place = round(math.hypot(x, y) / reach * _RINGS) if reach else 0
                if loss is not None and place <= _RINGS:
                    rings[place].append(loss)
        kept = [(reach * place / _RINGS, sum(ring) / len(ring)) for place, ring in enumerate(rings) if ring]
        if kept:
            lines.append(Line(grid.label, grid.place, [x for x, _ in kept], [y for _, y in kept]))
    if not lines:
        return None
    return _lines(
        "landscape-profile",
        "How steep: loss by distance from the minimum",
        f"The same landscapes, seed {seed}, averaged over all points at one distance.",
        lines,
    )


def _slice(label: str, place: int, values: Json) -> Line | None:
    x, loss = numbers(values.get("x")), numbers(values.get("loss"))
    pairs = [(a, b) for a, b in zip(x, loss, strict=False) if a is not None and b is not None]
    return Line(label, place, [a for a, _ in pairs], [b for _, b in pairs]) if pairs and len(x) == len(loss) else None


def _sliced(kind: str, seed: int, lines: Sequence[Line]) -> Curves:
    where = "between checkpoints" if kind == _PLANE else "along one random direction"
    return _lines(f"slice-{kind}", f"Loss {where}", f"The training loss {where}, seed {seed}.", lines)


def _lines(key: str, title: str, text: str, lines: Sequence[Line]) -> Curves:
    values = [value for line in lines for value in line.y]
    log = min(values) > 0 and max(values) > _STEEP * sorted(values)[len(values) // 2]
    places = sorted({x for line in lines for x in line.x})
    by_line = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    table = Table(
        ["distance", *(line.label for line in lines)],
        [[say(x), *(say(found.get(x)) for found in by_line)] for x in places],
    )
    return Curves(key, title, text, "distance from the minimum", "training loss", table, lines, log)
