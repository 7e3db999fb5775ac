"""What a comparison found, as charts: accuracy against cost, paired differences, memory."""

from collections.abc import Sequence

from ..results import Row, pareto
from ..results.values import join
from ._charts import Chart, Cost, Dot, Strip, Table
from ._study import Study
from ._words import say, say_interval, say_p, say_size


def result_charts(study: Study) -> list[Chart]:
    """Those charts of a comparison that its numbers allow."""
    if not study.compared:
        return []
    charts = (_cost(study), _differences(study), _memory(study))
    return [chart for chart in charts if chart is not None]


def _cost(study: Study) -> Chart | None:
    known = [(place, row) for place, row in enumerate(study.rows) if row.accuracy and row.step_ratio is not None]
    front = [row.label for row in pareto(study.rows)]
    dots = [
        Dot(
            row.label,
            place,
            row.accuracy.mean,
            row.accuracy.half,
            row.step_ratio,
            row.label in front,
        )
        for place, row in known
        if row.accuracy and row.step_ratio is not None
    ]
    if not dots:
        return None
    return Cost(
        "cost",
        "Accuracy against cost",
        f"Higher is more accurate, further right is slower. On the line, no other method is at once as cheap and as "
        f"accurate, by their means: {join(front)}. Bars are 95 % confidence intervals. (The paper's Figure 1.)",
        f"time per step, as a multiple of {study.rows[0].label}",
        "test accuracy in %",
        Table(
            ["method", "time per step", "test accuracy %", "on the line"],
            [
                [row.label, f"{say(row.step_ratio, 3)}x", say_interval(row.accuracy), "yes" if dot.on_front else "no"]
                for dot, (_, row) in zip(dots, known, strict=True)
            ],
        ),
        dots,
    )


def _differences(study: Study) -> Chart | None:
    base = study.rows[0]
    dots = [
        Dot(row.label, place, row.difference.mean, row.difference.half, values=_paired(row, base))
        for place, row in enumerate(study.rows)
        if place and row.difference
    ]
    if not dots:
        return None
    by_place = {dot.place: dot for dot in dots}
    return Strip(
        "differences",
        f"Paired differences to {base.label}",
        f"Each method minus {base.label} on the same split, initial weights and batches. Faint dots are single seeds, "
        "bars 95 % confidence intervals of the mean. An interval that touches the line at zero shows no gain.",
        "points of test accuracy",
        "",
        Table(
            ["method", "mean difference", "p (corrected)", "each seed"],
            [
                [row.label, say_interval(row.difference, signed=True), say_p(row.p_value_holm),
                 ", ".join(f"{value:+.2f}" for value in by_place[place].values)]
                for place, row in enumerate(study.rows) if place in by_place
            ],
        ),
        dots,
        zero=True,
    )  # fmt: skip


def _paired(row: Row, base: Row) -> Sequence[float]:
    if len(row.test_accuracy) != len(base.test_accuracy):
        return []
    return [ours - theirs for ours, theirs in zip(row.test_accuracy, base.test_accuracy, strict=True)]


def _memory(study: Study) -> Chart | None:
    known = [(place, row) for place, row in enumerate(study.rows) if row.extra_bytes is not None]
    if not any(row.extra_bytes for _, row in known):
        return None
    most = max(row.extra_bytes or 0 for _, row in known)
    unit, divisor = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= pair[1]), ("B", 1.0))
    return Strip(
        "memory",
        "Extra memory",
        "What each method keeps beyond the base optimizer: copies of the network, or what it remembers of each sample.",
        unit,
        "",
        Table(["method", "extra memory"], [[row.label, say_size(row.extra_bytes)] for _, row in known]),
        [Dot(row.label, place, (row.extra_bytes or 0) / divisor) for place, row in known],
        zero=True,
        bars=True,
    )
