"""What a report knows of a comparison, or of runs trained one by one; read from files by `_read`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: The row it belongs to.
        seed: Its seed.
        metrics: A dictionary an epoch, in order.
        sharpness: What ``sharpness.json`` holds, if there is one.
        landscapes: What each ``landscape*.json`` holds.
    """

    label: str
    seed: int
    metrics: Sequence[Json]
    sharpness: Json | None = None
    landscapes: Sequence[Json] = ()


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % confidence interval, None where there is none."""

    mean: float
    half: float | None


@dataclass(frozen=True)
class Row:
    """One row of a comparison; the values that it lacks are None.

    Attributes:
        label: Its name, unique in the study.
        method: The method's.
        settings: The method's hyperparameters.
        accuracies: Test accuracy after the last epoch in percent, a value a seed.
        accuracy: Their mean.
        difference: Mean paired difference to the base, in points.
        p_value: Of that difference, corrected for the number of comparisons.
        step_ratio: Time per step as a multiple of the base's.
        step_seconds: Time per step.
        extra_bytes: What the method keeps in memory beyond the base optimizer.
    """

    label: str
    method: str = ""
    settings: Json = field(default_factory=dict)
    accuracies: Sequence[float] = ()
    accuracy: Interval | None = None
    difference: Interval | None = None
    p_value: float | None = None
    step_ratio: float | None = None
    step_seconds: float | None = None
    extra_bytes: float | None = None


@dataclass(frozen=True)
class Study:
    """A comparison, or runs trained one by one.

    Attributes:
        title: What was trained on what.
        name: The folder's or file's name.
        compared: Whether the first row is a base with which the others are compared.
        rows: The methods.
        runs: Those whose files were found.
        seeds: The seeds that every row has finished.
        verdict: What it means in plain words.
        notes: What the reader must know beside it, a sentence each.
        recipe: What the methods share.
        command: As it was typed.
        versions: Of the packages.
        hardware: Of the machine.
    """

    title: str
    name: str
    compared: bool
    rows: Sequence[Row]
    runs: Sequence[Run] = ()
    seeds: Sequence[int] = ()
    verdict: str = ""
    notes: Sequence[str] = ()
    recipe: Json = field(default_factory=dict)
    command: str = ""
    versions: Json = field(default_factory=dict)
    hardware: Json = field(default_factory=dict)

    def of(self, row: Row) -> list[Run]:
        """The runs of a row by seed; of the seeds that every row has finished, or of all where there is none."""
        kept = [run for run in self.runs if run.label == row.label and (not self.seeds or run.seed in self.seeds)]
        return sorted(kept, key=lambda run: run.seed)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other betters: none costs no more, is no less accurate and is not its equal; cheapest first."""
    known = [(row.step_ratio, -row.accuracy.mean, row) for row in rows if row.accuracy and row.step_ratio is not None]

    def bettered(cost: float, loss: float) -> bool:
        return any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b, _ in known)

    return [row for cost, loss, row in sorted(known, key=lambda each: each[:2]) if not bettered(cost, loss)]


def number(value: Any) -> float | None:
    """Returns a finite number as a float, and None for anything else.

    Example:
        >>> from flatmin.lab.report._study import number
        >>> number(3), number(float("nan")), number(True), number("3")
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(values: Any) -> list[float | None]:
    """Returns a list's items, those that are no finite numbers as None; an empty list for anything else."""
    return [number(value) for value in values] if isinstance(values, list) else []
