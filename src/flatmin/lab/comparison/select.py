"""Chooses hyperparameters on samples held out of the training set, before the comparison."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import FlatminWarning
from ..recipe import Recipe
from ..results import Row
from .run import Comparison

SHARE = 0.2  # of the training set that is held out
FIRST_SEED = 1000  # apart from those of the comparison, which draw other splits


def select(
    recipe: Recipe,
    rows: Sequence[Row],
    folder: Path,
    *,
    seeds: int,
    jobs: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Trains every candidate on four fifths of the training set and keeps the best of each method.

    The best has the highest mean accuracy on the last fifth after the last epoch; of equals, the lowest mean loss. A
    candidate of which a seed diverged comes after all others; where each did, a warning says so. The test set is not
    used. Held-out labels are wrong as often as the others, as a user's would be.

    Args:
        recipe: What the methods share.
        rows: The candidates, from `make_rows`; a method with one row is kept as it is.
        folder: Where the candidates' runs are kept; must not exist.
        seeds: Number of seeds for each candidate.
        jobs: As for `Comparison`.
        on_progress: As for `Comparison`.

    Returns:
        The rows to compare, in their order, and a record of the choice for the results.

    Raises:
        KeyboardInterrupt: If it was interrupted; the runs that are done are kept in ``folder``.
    """
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.method)]
    contested = [row for group in groups if len(group) > 1 for row in group]
    folder.mkdir(parents=True)
    comparison = Comparison(
        dataclasses.replace(recipe, validation=SHARE),
        [rows[0], *(row for row in contested if row is not rows[0])],
        folder,
        seeds=seeds,
        first_seed=FIRST_SEED,
        timed=False,
        jobs=jobs,
        on_progress=on_progress,
    )
    outcome = comparison.run()
    if outcome.interrupted:
        raise KeyboardInterrupt

    def merit(row: Row) -> tuple[float, ...]:
        accuracy = fmean(outcome.accuracies(row.label))
        if diverged := outcome.diverged(row.label):  # its losses are no numbers, which have no order
            return -diverged, accuracy
        return 0, accuracy, -fmean(outcome.metrics[row.label][seed]["test_loss"] for seed in outcome.seeds)

    chosen = [max(group, key=merit) if len(group) > 1 else group[0] for group in groups]
    for group, best in zip(groups, chosen, strict=True):
        if len(group) > 1 and outcome.diverged(best.label):
            warnings.warn(
                f"{best.method} diverged with every value that it was given, so {best.label} is no choice: give "
                "smaller values, or lower the learning rate",
                FlatminWarning,
                stacklevel=2,
            )
    found = {
        "held_out": SHARE,
        "seeds": outcome.seeds,
        "candidates": [
            {
                "label": row.label,
                "method": row.method,
                "validation_accuracy": outcome.accuracies(row.label),
                "diverged": outcome.diverged(row.label),
                "chosen": row in chosen,
            }
            for row in contested
        ],
    }
    return chosen, found
