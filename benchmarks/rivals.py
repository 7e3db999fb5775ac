"""The comparison of all methods: a table and a plot of accuracy against cost, from what was measured.

Accuracies come from ``flatmin compare`` (the commands stand in benchmarks/README.md), costs of a step from
``benchmarks/overhead.py`` on an idle machine. Where the second pass runs in some steps only, the cost is the mean by
the closure calls counted in training. On data whose steps were not measured there, the cost is the comparison's
own. Comparisons of one recipe, whose bases came out the same, are put together, and p-values corrected for all of their
rows. Methods have their names of today, whatever they were called when the results were written.

    python benchmarks/rivals.py
"""

import argparse
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flatmin.lab.comparison.outcome import compared
from flatmin.lab.comparison.stats import holm
from flatmin.lab.methods import FORMER_NAMES, get_method

RESULTS = Path(__file__).parent / "results"
COMPARISONS = (
    *("rivals-mnist1d-noise", "rivals-mnist1d", "rivals-digits", "rivals-digits-noise", "rivals-fashion"),
    *("looksam-mnist1d-noise", "looksam-digits", "squeeze-mnist1d-noise", "squeeze-digits"),
)
# Averages of the weights were judged there with averaged batch-norm statistics, and methods of one pass with those of
# moved weights: neither are their own. They have been measured again, on another processor, so that they stand in
# tables of their own.
JUDGED_AGAIN = {"ema", "lawa", "switch_ema", "msam", "s2sam"}
AVERAGES = (
    *("averages-mnist1d-noise", "averages-mnist1d", "averages-digits", "averages-digits-noise"),
    "averages-fashion",
)
ONE_PASS = ("one-pass-mnist1d-noise", "one-pass-mnist1d", "one-pass-digits")
# What statistics made anew do to the plain optimizer's networks, of the same seeds: what was judged again is compared
# with those.
FRESH = ("fresh-mnist1d-noise", "fresh-digits-noise", "fresh-fashion", "msam-mnist1d", "msam-digits")
FRESH_BASE = "base, fresh statistics"
DATA = {"mnist1d": "MNIST-1D", "digits": "digits", "fashion_experiment": "Fashion-MNIST"}
SHAPES = {"mnist1d": [1, 40], "digits": [1, 8, 8]}  # of which overhead.py measures the steps


@dataclass(frozen=True)
class Point:
    """One method on one data set."""

    method: str
    label: str
    accuracy: float
    half: float
    difference: float
    difference_half: float
    p_value: float | None
    cost: float
    at_the_edge: bool


def renamed(results: dict[str, Any]) -> dict[str, Any]:
    """A comparison with the names that its methods have today."""
    selection = results["selection"]
    if selection is not None:
        selection = {**selection, "candidates": [_renamed(each) for each in selection["candidates"]]}
    return {
        **results,
        "rows": [_renamed(row) for row in results["rows"]],
        "metrics": {_label(label): by_seed for label, by_seed in results["metrics"].items()},
        "selection": selection,
    }


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": _label(row["label"]), "method": FORMER_NAMES.get(row["method"], row["method"])}


def _label(label: str) -> str:
    method, space, settings = label.partition(" ")
    return f"{FORMER_NAMES.get(method, method)}{space}{settings}"


def cost_of(row: dict[str, Any], metrics: dict[str, Any], costs: dict[str, dict[str, Any]]) -> float:
    """The mean cost of a row's step, as a multiple of the base's; NaN where it was not measured."""
    if not costs:
        return float(row["step_ratio"])
    measured = costs.get(row["method"])
    if measured is None:
        return math.nan
    paying, plain = measured["ratio"], measured["ratio_of_a_step_that_does_not_pay"]
    if plain is None:
        return float(paying)
    calls = fmean(values["mean_closure_calls"] for values in metrics[row["label"]].values())
    share = (calls - 1) / (get_method(row["method"]).closure_calls - 1)
    return float(share * paying + (1 - share) * plain)


def edges(selection: dict[str, Any] | None) -> set[str]:
    """Chosen labels that are the first or last of their method's candidates: a wider grid might do better."""
    if selection is None:
        return set()
    by_method: dict[str, list[dict[str, Any]]] = {}
    for candidate in selection["candidates"]:
        by_method.setdefault(candidate["method"], []).append(candidate)
    ends = [end for some in by_method.values() for end in (some[0], some[-1])]
    return {end["label"] for end in ends if end["chosen"]}


def merged(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons of one recipe as one, in the order of the first of each.

    Raises:
        SystemExit: If their seeds or their bases differ: then they are not of the same code or machine.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for results in every:
        groups.setdefault(_recipe(results), []).append(results)
    return [_merged(some) for some in groups.values()]


def _recipe(results: dict[str, Any]) -> str:
    recipe = {name: value for name, value in results["recipe"].items() if value not in (0, None)}
    return json.dumps(recipe, sort_keys=True)


def against_fresh(results: dict[str, Any], every: list[dict[str, Any]]) -> dict[str, Any]:
    """A comparison in which what was judged again is paired with the base's networks with fresh statistics.

    Args:
        results: The comparison.
        every: Comparisons of which each base was measured after training, one of the same recipe.

    Raises:
        SystemExit: If there is none, or its seeds or base differ.
    """
    base, *rows = results["rows"]
    found = next((each for each in every if _recipe(each) == _recipe(results)), None)
    if found is None or found["rows"][0]["test_accuracy"] != base["test_accuracy"]:
        raise SystemExit(f"{title(results)}: no base with fresh statistics of its seeds, or it came out differently")
    fresh = found["rows"][0]["after"]["fresh"]["values"]
    own = {"method": "base", "label": FRESH_BASE, "test_accuracy": fresh, "step_ratio": 1.0, "settings": {}}
    rows = [
        _against(own, base["test_accuracy"]),
        *(_against(row, fresh) if row["method"] in JUDGED_AGAIN else row for row in rows),
    ]
    adjusted = holm([row["p_value"] for row in rows])
    rows = [{**row, "p_value_holm": value} for row, value in zip(rows, adjusted, strict=True)]
    metrics = {**results["metrics"], FRESH_BASE: results["metrics"][base["label"]]}
    return {**results, "rows": [base, *rows], "metrics": metrics}


def _against(row: dict[str, Any], base: list[float]) -> dict[str, Any]:
    """A row with its paired difference to ``base``."""
    found = compared(row["test_accuracy"], base)
    assert found.mean is not None
    assert found.difference is not None
    return {
        **row,
        "accuracy": asdict(found.mean),
        "difference": asdict(found.difference),
        "p_value": found.p_value,
    }


def _merged(some: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = some
    rows, metrics = [*first["rows"]], {**first["metrics"]}
    candidates = [*(first["selection"] or {"candidates": []})["candidates"]]
    for other in others:
        base = other["rows"][0]
        if other["seeds"] != first["seeds"] or base["test_accuracy"] != rows[0]["test_accuracy"]:
            raise SystemExit(f"{title(other)}: the comparisons have other seeds, or bases that came out differently")
        rows += other["rows"][1:]
        metrics = {**other["metrics"], **metrics}
        candidates += (other["selection"] or {"candidates": []})["candidates"]
    adjusted = holm([row["p_value"] for row in rows[1:]])
    rows[1:] = [{**row, "p_value_holm": value} for row, value in zip(rows[1:], adjusted, strict=True)]
    return {**first, "rows": rows, "metrics": metrics, "selection": {"candidates": candidates}}


def read(results: dict[str, Any], costs: dict[str, Any]) -> list[Point]:
    """The points of one comparison, the base first and then from the most accurate on."""
    wanted = results["recipe"]["model"], SHAPES.get(data_of(results))
    cases = [case for case in costs["cases"] if (case["model"], case["image"]) == wanted]
    by_method = {_label(row["method"]): row for case in cases for row in case["rows"]}
    edge = edges(results["selection"])
    points = [
        Point(
            row["method"],
            row["label"],
            row["accuracy"]["mean"],
            row["accuracy"]["half"],
            row["difference"]["mean"],
            row["difference"]["half"],
            row.get("p_value_holm"),
            cost_of(row, results["metrics"], by_method),
            row["label"] in edge,
        )
        for row in results["rows"]
    ]
    return [points[0], *sorted(points[1:], key=lambda point: -point.accuracy)]


def front(points: list[Point]) -> list[Point]:
    """The Pareto front: those that no other beats in accuracy at the same cost or less."""
    return [
        point
        for point in points
        if not any(
            other.cost <= point.cost
            and other.accuracy >= point.accuracy
            and (other.cost, other.accuracy) != (point.cost, point.accuracy)
            for other in points
        )
    ]


def data_of(results: dict[str, Any]) -> str:
    """The name of the data, or of the experiment file."""
    recipe = results["recipe"]
    return Path(recipe["experiment"]).stem if recipe.get("experiment") else str(recipe["data"])


def title(results: dict[str, Any]) -> str:
    """What the comparison was on."""
    recipe = results["recipe"]
    data = DATA[data_of(results)]
    samples = f", {recipe['train_samples']:,} images" if recipe.get("train_samples") else ""
    noise = f", {recipe['label_noise']:.0%} wrong labels" if recipe["label_noise"] else ""
    return f"{data}{samples}{noise}"


def read_all(
    results: Sequence[Path], costs: Path, without: Collection[str] = (), fresh: Sequence[Path] = ()
) -> list[tuple[dict[str, Any], list[Point]]]:
    """The comparisons in these files, with their points.

    Some methods are left out, and counted in the correction of the p-values all the same. With ``fresh``, files of
    bases, see `against_fresh`.
    """
    every = merged([renamed(json.loads(path.read_text())) for path in results])
    if fresh:
        bases = [json.loads(path.read_text()) for path in fresh]
        every = [against_fresh(each, bases) for each in every]
    kept = [{**each, "rows": [row for row in each["rows"] if row["method"] not in without]} for each in every]
    measured = json.loads(costs.read_text())
    return [(each, read(each, measured)) for each in kept]


def judged_again(names: Sequence[str], results: Path = RESULTS) -> list[tuple[dict[str, Any], list[Point]]]:
    """The comparisons of these names, of what was judged again."""
    files = [[results / f"{name}.json" for name in some] for some in (names, FRESH)]
    return read_all(files[0], results / "overhead-cpu.json", fresh=files[1])


def tables(comparisons: list[tuple[dict[str, Any], list[Point]]]) -> str:
    """A Markdown table of each comparison."""
    return "\n".join(table(*each) for each in comparisons)


def table(results: dict[str, Any], points: list[Point]) -> str:
    """A Markdown table; the Pareto front in bold."""
    best = {point.label for point in front(points)}
    lines = [
        f"### {title(results)}, {len(results['seeds'])} seeds",
        "",
        "| method | test accuracy % | paired difference | p (Holm) | time/step |",
        "|---|---|---|---|---|",
    ]
    for number, point in enumerate(points):
        label = f"{point.label}{' (edge)' if point.at_the_edge else ''}"
        name = f"**{label}**" if point.label in best else label
        difference = "" if number == 0 else f"{point.difference:+.2f} ± {point.difference_half:.2f}"
        p_value = "" if point.p_value is None else f"{point.p_value:.3f}" if point.p_value >= 0.001 else "< 0.001"
        cost = "not measured" if math.isnan(point.cost) else f"{point.cost:.2f}x"
        lines.append(f"| {name} | {point.accuracy:.2f} ± {point.half:.2f} | {difference} | {p_value} | {cost} |")
    return "\n".join(lines) + "\n"


def plot(comparisons: list[tuple[dict[str, Any], list[Point]]], path: Path) -> None:
    """Accuracy against cost, a panel for each comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "flatmin"  # the same file from the same numbers
    columns = min(len(comparisons), 2)
    rows = math.ceil(len(comparisons) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(7 * columns, 5.2 * rows), squeeze=False)
    figure.subplots_adjust(0.06, 0.12 / rows, 0.98, 1 - 0.08 / rows, 0.14, 0.24)  # first: names are placed by it
    for axis in axes.flat[len(comparisons) :]:
        axis.set_axis_off()
    for axis, (results, points) in zip(axes.flat, comparisons, strict=False):
        best = sorted(front(points), key=lambda point: point.cost)
        axis.plot([p.cost for p in best], [p.accuracy for p in best], color="#0072B2", linewidth=1, zorder=1)
        for point in points:
            on = point in best
            color = "#0072B2" if on else "#777777"
            axis.errorbar(point.cost, point.accuracy, point.half, fmt="o" if on else "s", color=color, markersize=5)
        top = max(point.accuracy + point.half for point in points)
        floor = points[0].accuracy - max(top - points[0].accuracy, points[0].half)
        lowest = min(point.accuracy - point.half for point in points)
        axis.set_ylim(max(floor, lowest - 0.05 * (top - lowest)), top + 0.05 * (top - points[0].accuracy))
        axis.margins(x=0.12)
        _name(axis, points)
        axis.axhline(points[0].accuracy, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(title(results))
        axis.set_xlabel("time of a step, multiple of the plain optimizer's")
        axis.set_ylabel("test accuracy, %")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _name(axis: Any, points: list[Point]) -> None:
    """Writes each method beside its point, below the names that stand there already; those out of sight at the edge."""
    axis.autoscale_view(scaley=False)
    bottom, _ = axis.get_ylim()
    taken: list[tuple[float, float, float]] = []  # left, right and height of a name, in points on the paper
    for point in sorted(points, key=lambda point: -point.accuracy):
        seen = point.accuracy >= bottom
        text = point.method if seen else f"{point.method} {point.accuracy:.1f} (below)"
        x, y = axis.transData.transform((point.cost, max(point.accuracy, bottom))) * 72 / axis.figure.dpi
        left, height = x + 5, y + (3 if seen else 6)
        right = left + 4.6 * len(text)
        while any(left < end and right > start and abs(height - other) < 8.5 for start, end, other in taken):
            height += 1 if not seen else -1
        taken.append((left, right, height))
        axis.annotate(
            text,
            (point.cost, max(point.accuracy, bottom)),
            xytext=(left - x, height - y),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999"} if abs(height - y) > 6 else None,
        )


def main() -> None:
    """Writes the tables and the plot, and beside them the tables of what was judged again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [RESULTS / f"{name}.json" for name in COMPARISONS]
    parser.add_argument("results", type=Path, nargs="*", default=every, help="results.json of flatmin compare")
    costs = RESULTS / "overhead-cpu.json"
    parser.add_argument("--costs", type=Path, default=costs, help="result of benchmarks/overhead.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "rivals", help="the .md and the .svg without its ending")
    arguments = parser.parse_args()
    comparisons = read_all(arguments.results, arguments.costs, JUDGED_AGAIN)
    arguments.out.with_suffix(".md").write_text(tables(comparisons))
    for name, of in (("averages", AVERAGES), ("one-pass", ONE_PASS)):
        arguments.out.with_name(f"{arguments.out.name}-{name}.md").write_text(tables(judged_again(of)))
    plot(comparisons, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
