"""What a comparison has found so far, and what that comes to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..methods import get_method
from ..recipe import Recipe
from ..results import Compared, ComparisonResult, Row, verdict
from ..results.after import AFTER
from ..results.values import is_diverged, number
from .stats import holm, interval, paired_p_value

_KINDS = (int, float, type(None))  # of what is in a file; None stands for what is no number, as after divergence

ROUNDING = 2e-5  # points: accuracies are shares in float32, and a single sample of two millions is more


def compared(values: Sequence[float], base: Sequence[float] | None) -> Compared:
    """The mean of some values, and their difference to the base's, paired by seed; without a base there is none."""
    if base is None:
        return Compared(values, interval(values))
    differences = [ours - theirs for ours, theirs in zip(values, base, strict=True)]
    return Compared(values, interval(values), interval(differences), paired_p_value(differences, rounding=ROUNDING))


def measured(metrics: Mapping[str, float]) -> bool:
    """Whether a run has all of `AFTER`, or has diverged, after which nothing is measured."""
    return is_diverged(metrics) or metrics.keys() >= AFTER.keys()


def _sound(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A run's metrics from a file; empty if they are damaged, without a measure that is."""
    if number(metrics.get("test_accuracy")) is None or any(not isinstance(each, _KINDS) for each in metrics.values()):
        return {}
    return {name: value for name, value in metrics.items() if name not in AFTER or number(value) is not None}


@dataclass
class Outcome:
    """What a comparison has found so far.

    Attributes:
        recipe: What the methods share.
        rows: The methods; the first is the base that the others are compared with.
        metrics: For each row's label, the last epoch's metrics by seed, and what was measured after training.
        step_ratio: For each label, the median ratio of its step time to the base's; where only some steps have a second
            pass, of one that has.
        plain_ratio: For each label of which only some steps have a second pass, the ratio of the others.
        step_seconds: For each label, the median step time; where only some steps have a second pass, of one that has.
        extra_bytes: For each label, the memory it needs beyond the base optimizer.
        interrupted: Whether it was ended before all runs were done.
        selection: How the rows were chosen among candidates, if they were; see `select`.
    """

    recipe: Recipe
    rows: Sequence[Row]
    metrics: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    step_ratio: dict[str, float] = field(default_factory=dict)
    plain_ratio: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    selection: dict[str, Any] | None = None

    def take(self, earlier: ComparisonResult) -> None:
        """Takes in what the same comparison found before it was ended: its runs, and times where every row has them."""
        labels = [row.label for row in self.rows]
        for by_label in (earlier.metrics, earlier.partial):
            for label in labels:
                known = {seed: _sound(found) for seed, found in by_label.get(label, {}).items()}
                self.metrics.setdefault(label, {}).update({seed: found for seed, found in known.items() if found})
        rows = {row.label: row for row in earlier.rows}
        full = {label: earlier.full_step_ratio.get(label, rows[label].step_ratio) for label in labels if label in rows}
        seconds = {label: rows[label].step_seconds for label in full}
        ratios = {label: ratio for label, ratio in full.items() if ratio is not None and seconds[label] is not None}
        if len(ratios) == len(labels) and earlier.plain_step_ratio.keys() == earlier.full_step_ratio.keys():
            self.step_ratio, self.plain_ratio = ratios, dict(earlier.plain_step_ratio)
            self.step_seconds = {label: each for label, each in seconds.items() if each is not None}
            self.extra_bytes = {label: int(rows[label].extra_bytes or 0) for label in labels}

    @property
    def seeds(self) -> list[int]:
        """The seeds that every row has finished."""
        finished = [set(self.metrics.get(row.label, {})) for row in self.rows]
        return sorted(set.intersection(*finished)) if finished else []

    def accuracies(self, label: str) -> list[float]:
        """Test accuracy after the last epoch, in percent, for each of `seeds`."""
        return [100 * self.metrics[label][seed]["test_accuracy"] for seed in self.seeds]

    def mean_step_ratio(self, row: Row) -> float | None:
        """The mean ratio over a row's steps, with and without a second pass; None where it was not measured."""
        full, plain = self.step_ratio.get(row.label), self.plain_ratio.get(row.label)
        if full is None or plain is None or not self.seeds:
            return full
        calls = [self.metrics[row.label][seed]["mean_closure_calls"] for seed in self.seeds]
        share = (math.fsum(calls) / len(calls) - 1) / (get_method(row.method).closure_calls - 1)
        return share * full + (1 - share) * plain

    def filled_rows(self) -> list[Row]:
        """The rows with accuracies, intervals, paired differences to the base, p-values and costs.

        A row of which a seed diverged has no accuracy, no difference and no p-value; if it is the base, no row has a
        difference. Holm's correction counts the rows that are compared.
        """
        base = self.accuracies(self.rows[0].label)
        filled = [self._filled(row, base) for row in self.rows]
        compared = [row for row in filled[1:] if row.p_value is not None]
        adjusted = holm([row.p_value for row in compared if row.p_value is not None])
        corrected = {row.label: p for row, p in zip(compared, adjusted, strict=True)}
        return self._after_corrected([replace(row, p_value_holm=corrected.get(row.label)) for row in filled])

    def _after_corrected(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with p-values of what was measured after training corrected for all rows and all measures."""
        keys = [(row.label, name) for row in rows[1:] for name, each in row.after.items() if each.p_value is not None]
        by_label = {row.label: row for row in rows}
        raw = [by_label[label].after[name].p_value for label, name in keys]
        corrected = dict(zip(keys, holm([p for p in raw if p is not None]), strict=True))
        return [
            replace(
                row,
                after={
                    name: replace(each, p_value_holm=corrected.get((row.label, name)))
                    for name, each in row.after.items()
                },
            )
            for row in rows
        ]

    def diverged(self, label: str) -> int:
        """How many of `seeds` ended with a test loss that is infinite or not a number."""
        return sum(is_diverged(self.metrics[label][seed]) for seed in self.seeds)

    def _filled(self, row: Row, base: Sequence[float]) -> Row:
        accuracies = self.accuracies(row.label)
        row = replace(
            row,
            test_accuracy=accuracies,
            step_ratio=self.mean_step_ratio(row),
            step_seconds=self.step_seconds.get(row.label),
            extra_bytes=self.extra_bytes.get(row.label),
            epsilon=self._epsilon(row.label),
        )
        if not accuracies:
            return row
        if diverged := self.diverged(row.label):
            return row.with_diverged(diverged)
        found = compared(accuracies, None if self.diverged(self.rows[0].label) else base)
        return replace(
            row,
            accuracy=found.mean,
            difference=found.difference,
            p_value=found.p_value,
            after=self._after(row.label),
        )

    def _after(self, label: str) -> dict[str, Compared]:
        """What was measured after training, of the seeds of which every row that has any of it has it."""
        base, found = self.rows[0].label, {}
        for name in AFTER:
            having = [
                row.label
                for row in self.rows
                if not self.diverged(row.label) and any(name in self.metrics[row.label][seed] for seed in self.seeds)
            ]
            seeds = [seed for seed in self.seeds if all(name in self.metrics[label][seed] for label in having)]
            percent = {each: [100 * self.metrics[each][seed][name] for seed in seeds] for each in having}
            if seeds and label in percent:
                found[name] = compared(percent[label], percent.get(base))
        return found

    def _epsilon(self, label: str) -> float | None:
        """The most that one of `seeds` has spent."""
        every = [self.metrics[label][seed].get("epsilon") for seed in self.seeds]
        return max((each for each in every if each is not None), default=None)

    def unmeasured(self) -> list[tuple[Row, int]]:
        """The runs that were trained and are not `measured`."""
        return [
            (row, seed)
            for row in self.rows
            for seed, metrics in sorted(self.metrics.get(row.label, {}).items())
            if not measured(metrics)
        ]

    def result(self, folder: Path | None = None) -> ComparisonResult:
        """What there is so far; runs of seeds that not every row has finished come as ``partial``."""
        seeds, rows = self.seeds, self.filled_rows()
        return ComparisonResult(
            rows,
            seeds,
            verdict(rows, len(seeds)),
            asdict(self.recipe),
            self.interrupted,
            {label: {seed: by_seed[seed] for seed in seeds} for label, by_seed in self.metrics.items()},
            {
                label: {seed: values for seed, values in by_seed.items() if seed not in seeds}
                for label, by_seed in self.metrics.items()
            },
            self.plain_ratio,
            self.selection,
            folder,
            full_step_ratio={label: self.step_ratio[label] for label in self.plain_ratio if label in self.step_ratio},
        )
