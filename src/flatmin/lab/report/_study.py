"""What a report knows of a comparison, or of runs trained one by one; read from files by `_read`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..results import Row

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
