"""Curves by epoch: the mean over a row's seeds, and a band from its lowest seed to its highest."""

from collections.abc import Sequence

from ..results.values import number
from ._charts import Curves, Line, Table
from ._study import Run, Study
from ._words import NONE, say

_SOFT = "Softened predictions raise it by themselves where logits are raw: read it beside the normalised one."
# What metrics.jsonl may hold: name, title, axis, factor, whether a logarithm may be taken, what to say.
_METRICS = (
    (
        "train_loss_vanilla",
        "Training loss without the penalty",
        "training loss",
        1,
        True,
        "The criterion alone, whatever a method adds to it, so that methods can be compared. (The paper's Figure 4a.)",
    ),
    ("test_accuracy", "Test accuracy", "test accuracy in %", 100, False, "After each epoch; results are of the last."),
    (
        "sharpness",
        "SAM sharpness",
        "rise of the loss",
        1,
        True,
        f"How much the training loss rises a short way up its slope. (The paper's Figure 4b.) {_SOFT}",
    ),
    (
        "sharpness_normalised",
        "SAM sharpness, logits normalised",
        "rise of the loss",
        1,
        True,
        "The same with each sample's logits scaled to one size, so that how sure a network is plays no part.",
    ),
    ("test_loss", "Test loss", "test loss", 1, True, "Cross-entropy on the test set after each epoch."),
    ("gradient_norm", "Gradient norm", "norm of the gradient", 1, True, "Length of the training loss's gradient."),
    (
        "top_eigenvalue",
        "Largest eigenvalue of the Hessian",
        "eigenvalue",
        1,
        True,
        "Curvature of the training loss along its steepest bend.",
    ),
    (
        "lr_times_top_eigenvalue",
        "Learning rate times largest eigenvalue",
        "learning rate x eigenvalue",
        1,
        True,
        "Plain gradient descent is stable below 2, the line drawn; training often hovers about it.",
    ),
)
_EDGE = 2.0  # of stability
_DECADE = 10.0


def curve_charts(study: Study) -> list[Curves]:
    """A chart for each metric that any run has logged."""
    charts = []
    for name, title, y, factor, may_log, text in _METRICS:
        lines = []
        for place, row in enumerate(study.rows):
            line = _line(row.label, place, study.of(row), name, factor)
            if line is not None:
                lines.append(line)
        if lines:
            values = [value for line in lines for value in (*line.y, *line.low)]
            log = may_log and min(values) > 0 and max(values) > _DECADE * min(values)
            most = max(len(study.of(row)) for row in study.rows)
            band = " The band spans all seeds, the line is their mean." if most > 1 else ""
            charts.append(
                Curves(
                    name,
                    title,
                    text + band,
                    "epochs done",
                    y,
                    _table(lines),
                    lines,
                    log,
                    _EDGE if name == "lr_times_top_eigenvalue" else None,
                )
            )
    return charts


def _line(label: str, place: int, runs: Sequence[Run], name: str, factor: float) -> Line | None:
    by_epoch: dict[int, list[float]] = {}
    for run in runs:
        for index, metrics in enumerate(run.metrics):
            value, epoch = number(metrics.get(name)), number(metrics.get("epoch"))
            if value is not None:
                by_epoch.setdefault(int(index if epoch is None else epoch) + 1, []).append(factor * value)
    if not by_epoch:
        return None
    epochs = sorted(by_epoch)
    band = max(len(values) for values in by_epoch.values()) > 1
    return Line(
        label,
        place,
        epochs,
        [sum(by_epoch[epoch]) / len(by_epoch[epoch]) for epoch in epochs],
        [min(by_epoch[epoch]) for epoch in epochs] if band else (),
        [max(by_epoch[epoch]) for epoch in epochs] if band else (),
    )


def _table(lines: Sequence[Line]) -> Table:
    cells: dict[float, dict[str, str]] = {}
    for line in lines:
        for place, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
            band = f" ({say(line.low[place])} to {say(line.high[place])})" if line.low else ""
            cells.setdefault(x, {})[line.label] = say(y) + band
    labels = [line.label for line in lines]
    return Table(
        ["epochs done", *labels], [[f"{x:g}", *(cells[x].get(name, NONE) for name in labels)] for x in sorted(cells)]
    )
