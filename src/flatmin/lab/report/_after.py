"""What is left of networks after training: with rounded weights, with noise on them, and fine-tuned elsewhere."""

from collections.abc import Mapping

from ..results import Compared, Row
from ..results.after import BITS, NOISE
from ..results.interval import say_points
from ..results.tables import after_names
from ..results.values import count_of
from ._charts import Curves, Line, Table
from ._study import Study
from ._words import NONE, say, say_interval, say_p

HOW = (
    "The networks that were evaluated, with batch-norm statistics made anew, and changed in three ways. Rounded: "
    "weights to the nearest of 2^bits levels, with one step size for each output channel. Noise: Gaussian, on the "
    "weights, its size relative to theirs. Batch-norm statistics are then made anew. Fine-tuned: for a tenth of the "
    "run at a tenth of its learning rate, on inputs whose sign is changed, or by the experiment file's shift(x): what "
    "the original test set loses, and the shifted one gains. p is corrected for all rows and all measures here."
)
_TITLES = {
    "fresh": "batch-norm statistics made anew, weights as they are",
    **{f"rounded_{bits}": f"weights rounded to {bits} bits" for bits in BITS},
    **{f"noise_{level}": f"noise of {level} times the weights" for level in NOISE},
    "tuned_original": "fine-tuned on shifted inputs: original test set",
    "tuned_shifted": "fine-tuned on shifted inputs: shifted test set",
}


def after_tables(study: Study) -> list[tuple[str, Table]]:
    """For each measure its name and the rows: accuracy, what it is less than before, and the difference to the base."""
    head = ["method", "accuracy %", "from before", "difference", "p (corrected)"]
    tables = []
    for name in after_names(study.rows):
        having = [row for row in study.rows if name in row.after]
        measured, seeds = len(having[0].after[name].values), len(having[0].test_accuracy)
        some = f" ({measured} of {count_of(seeds, 'seed')})" if measured < seeds else ""
        cells = [_cells(row, row.after[name]) for row in having]
        tables.append((f"{_TITLES.get(name, name)}{some}", Table(head, cells)))
    return tables


def _cells(row: Row, found: Compared) -> list[str]:
    same = len(found.values) == len(row.test_accuracy)  # not every seed was measured where measuring was interrupted
    change = say_points(found.mean.mean - row.accuracy.mean) if found.mean and row.accuracy and same else NONE
    is_base = found.p_value_holm is None
    difference = "" if is_base else say_interval(found.difference, signed=True)
    return [row.label, say_interval(found.mean), change, difference, "" if is_base else say_p(found.p_value_holm)]


def after_charts(study: Study) -> list[Curves]:
    """Accuracy over the width of the weights, and over the noise on them."""
    charts = (
        _chart(
            study,
            "rounded",
            "Accuracy after rounding",
            "bits of a weight",
            {float(bits): f"rounded_{bits}" for bits in sorted(BITS)},
        ),
        _chart(
            study,
            "noise",
            "Accuracy with noise on the weights",
            "noise, relative to the weights",
            {0.0: "fresh", **{level: f"noise_{level}" for level in NOISE}},
        ),
    )
    return [chart for chart in charts if chart is not None]


def _chart(study: Study, key: str, title: str, x: str, names: Mapping[float, str]) -> Curves | None:
    lines = [_line(row, place, names) for place, row in enumerate(study.rows) if row.after.keys() & set(names.values())]
    if not lines:
        return None
    table = Table(
        ["method", *(f"{value:g}" for value in names)],
        [[line.label, *(say(dict(zip(line.x, line.y, strict=True)).get(value)) for value in names)] for line in lines],
    )
    text = "Means over seeds, and the band from the lowest to the highest."
    return Curves(key, title, text, x, "test accuracy in %", table, lines)


def _line(row: Row, place: int, names: Mapping[float, str]) -> Line:
    """A row's line; files that have nothing measured with fresh statistics alone have the accuracy before there."""
    by_place = {x: row.after[name].values if name in row.after else [] for x, name in names.items()}
    if "fresh" in names.values() and "fresh" not in row.after:
        by_place[0.0] = row.test_accuracy
    found = {x: values for x, values in by_place.items() if values}
    band = max(map(len, found.values()), default=0) > 1
    return Line(
        row.label,
        place,
        list(found),
        [sum(values) / len(values) for values in found.values()],
        [min(values) for values in found.values()] if band else (),
        [max(values) for values in found.values()] if band else (),
    )
