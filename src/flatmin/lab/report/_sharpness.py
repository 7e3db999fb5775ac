"""Measures of sharpness as a table, and the Hessian's spectra."""

from collections.abc import Sequence

from ..results.values import number, numbers
from ._charts import Chart, Curves, Dot, Line, Strip, Table
from ._study import Json, Study
from ._words import NONE, say

CAUTION = (
    "Sharpness is measured on the training loss, and is no accuracy: a flatter network need not be a better one. "
    "Methods that soften predictions, as label smoothing, SAF and MESA do, raise the cross-entropy and with it raw "
    "sharpness. With logits normalised, each sample's are scaled to one size first; compare methods by that, and "
    "believe a difference that both columns show."
)
_NAMES = {
    "sam_sharpness": "SAM sharpness",
    "sam_sharpness_adaptive": "adaptive SAM sharpness",
    "average_sharpness": "average sharpness",
    "top_eigenvalue": "largest eigenvalue",
    "hessian_trace": "trace of the Hessian",
}
_TAIL = 1e-6  # of the highest density: below, a curve on a logarithmic scale would go on for ever


def measure_tables(study: Study) -> list[tuple[str, Table]]:
    """For each measure its name and its values, raw beside normalised: mean and range over the seeds that have it."""
    found: dict[tuple[str, float | None], dict[tuple[str, str], list[tuple[float, float | None]]]] = {}
    for row in study.rows:
        for run in study.of(row):
            for measure in _measures(run.sharpness):
                value = number(measure.get("value"))
                if value is not None:
                    key = (str(measure.get("name", "?")), number(measure.get("rho")))
                    cell = (row.label, "normalised" if measure.get("logits") == "normalised" else "raw")
                    error = number(measure.get("standard_error"))
                    found.setdefault(key, {}).setdefault(cell, []).append((value, error))
    tables = []
    for (name, rho), cells in found.items():
        title = _NAMES.get(name, name.replace("_", " ")) + ("" if rho is None else f", rho {rho:g}")
        rows = []
        for row in study.rows:
            pair = [cells.get((row.label, logits), []) for logits in ("raw", "normalised")]
            if any(pair):
                rows.append([row.label, *(_cell(values) for values in pair), str(max(map(len, pair)))])
        tables.append((title, Table(["method", "raw logits", "normalised logits", "seeds"], rows)))
    return tables


def _measures(sharpness: Json | None) -> Sequence[Json]:
    measures = sharpness.get("measures") if sharpness else None
    return [each for each in measures if isinstance(each, dict)] if isinstance(measures, list) else []


def _cell(values: Sequence[tuple[float, float | None]]) -> str:
    if not values:
        return NONE
    if len(values) == 1:
        value, error = values[0]
        return say(value) + ("" if error is None else f" (s.e. {say(error, 2)})")
    each = [value for value, _ in values]
    return f"{say(sum(each) / len(each))} ({say(min(each))} to {say(max(each))})"


def spectrum_charts(study: Study) -> list[Chart]:
    """The largest eigenvalues and the density of all, of each row's lowest seed that has them."""
    dots, lines = [], []
    for place, row in enumerate(study.rows):
        found = [run.sharpness for run in study.of(row) if run.sharpness]
        eigenvalues = next((kept for each in found if (kept := _kept(each.get("eigenvalues")))), [])
        if eigenvalues:
            dots.append(Dot(row.label, place, max(eigenvalues), values=sorted(eigenvalues, reverse=True)))
        densities = (_density(row.label, place, each.get("spectral_density")) for each in found)
        line = next((density for density in densities if density), None)
        if line is not None:
            lines.append(line)
    charts: list[Chart] = []
    if dots:
        charts.append(
            Strip(
                "eigenvalues",
                "Largest eigenvalues of the Hessian",
                "Each dot is one eigenvalue of the training loss's Hessian at the end, the large one the largest. "
                "Further left is flatter.",
                "eigenvalue",
                "",
                Table(["method", "eigenvalues"], [[dot.label, ", ".join(map(say, dot.values))] for dot in dots]),
                dots,
                zero=True,
            )
        )
    if lines:
        table = Table(
            ["method", "from", "to", "peak at"],
            [[line.label, say(line.x[0]), say(line.x[-1]), say(line.x[line.y.index(max(line.y))])] for line in lines],
        )
        charts.append(
            Curves(
                "spectrum",
                "Spectral density of the Hessian",
                "How the eigenvalues are spread: nearly all lie at zero, and how far the tail reaches to the right is "
                "how sharp the minimum is.",
                "eigenvalue",
                "density",
                table,
                lines,
                log=True,
            )
        )
    return charts


def _kept(values: object) -> list[float]:
    return [value for value in numbers(values) if value is not None]


def _density(label: str, place: int, values: object) -> Line | None:
    if not isinstance(values, dict):
        return None
    grid, density = numbers(values.get("grid")), numbers(values.get("density"))
    if len(grid) != len(density):
        return None
    pairs = [(x, y) for x, y in zip(grid, density, strict=True) if x is not None and y is not None]
    floor = _TAIL * max((y for _, y in pairs), default=0.0)
    kept = [(x, y) for x, y in pairs if y > floor]
    return Line(label, place, [x for x, _ in kept], [y for _, y in kept]) if kept else None
