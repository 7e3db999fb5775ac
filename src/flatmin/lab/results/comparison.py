"""What a comparison found, and its results file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._files import read_json
from ...errors import DataError
from .files import RESULTS
from .judgement import verdict
from .rows import Json, Row
from .tables import after_caption, after_table, as_text, main_table
from .values import count_of, is_diverged, number, numbers

ByLabel = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found; ``print`` shows it as a table with the verdict below.

    Attributes:
        rows: The methods; the first is the base that the others are compared with.
        seeds: The seeds that every row has finished.
        verdict: What it means in plain words, see `verdict`.
        recipe: What the methods share, as plain values.
        interrupted: Whether it was ended before all runs were done.
        metrics: For each label and seed, the metrics of the last epoch.
        partial: The same for seeds that not every row has finished.
        plain_step_ratio: For each label of which only some steps have a second pass, the time ratio of the others.
        selection: How the rows were chosen among candidates, if they were.
        folder: Where it is kept, if it is.
        page: Its report, if one was written.
        full_step_ratio: For each label of ``plain_step_ratio``, the time ratio of a step that has a second pass.
    """

    rows: Sequence[Row]
    seeds: Sequence[int]
    verdict: str
    recipe: Json = field(default_factory=dict)
    interrupted: bool = False
    metrics: ByLabel = field(default_factory=dict)
    partial: ByLabel = field(default_factory=dict)
    plain_step_ratio: Mapping[str, float] = field(default_factory=dict)
    selection: Json | None = None
    folder: Path | None = None
    page: Path | None = None
    full_step_ratio: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What was trained on what."""
        return title(self.recipe)

    def to_json(self) -> dict[str, Any]:
        """Returns what `RESULTS` holds, without the command, versions and hardware."""
        return {
            "recipe": dict(self.recipe),
            "base": self.rows[0].label,
            "seeds": list(self.seeds),
            "interrupted": self.interrupted,
            "verdict": self.verdict,
            "rows": [row.to_json() for row in self.rows],
            "plain_step_ratio": dict(self.plain_step_ratio),
            "full_step_ratio": dict(self.full_step_ratio),
            "selection": self.selection,
            **{
                name: {label: {str(seed): values for seed, values in by.items()} for label, by in given.items()}
                for name, given in (("metrics", self.metrics), ("partial", self.partial))
            },
        }

    @classmethod
    def from_json(cls, values: Json, where: str, *, folder: Path | None = None) -> "ComparisonResult":
        """Takes what `to_json` returned, or the configuration of a comparison that has no results yet.

        Args:
            values: From `read_json`.
            where: The file, for the error.
            folder: The comparison's.

        Raises:
            DataError: If it is no comparison, or is damaged.
        """
        rows, recipe = values.get("rows"), values.get("recipe")
        if not (isinstance(rows, list) and rows and isinstance(recipe, dict)):
            raise DataError(f"{where}: not a comparison of flatmin (rows and recipe are missing)")
        if not all(isinstance(row, dict) and isinstance(row.get("label"), str) for row in rows):
            raise DataError(f"{where}: is damaged: a row has no label")
        metrics = _by_label(values.get("metrics"))
        read = [Row.from_json(row) for row in rows]
        if len({row.label for row in read}) != len(read):
            raise DataError(f"{where}: is damaged: two rows have the same label")
        made = _settled(read, metrics)
        seeds = [int(seed) for seed in numbers(values.get("seeds")) if seed is not None]
        written = values.get("verdict")
        return cls(
            made,
            seeds,
            written if isinstance(written, str) and made == read else verdict(made, len(seeds)),
            recipe,
            bool(values.get("interrupted")),
            metrics,
            _by_label(values.get("partial")),
            _ratios(values.get("plain_step_ratio")),
            _mapping(values.get("selection")) or None,
            folder,
            full_step_ratio=_ratios(values.get("full_step_ratio")),
        )

    def __str__(self) -> str:
        if not self.seeds:
            return self.verdict
        lines = [self.heading(), as_text(main_table(self.rows))]
        if after := after_table(self.rows, len(self.seeds)):
            lines += [as_text(after), after_caption(self.rows, len(self.seeds))]
        return "\n".join([*lines, self.verdict])

    def heading(self) -> str:
        """One line on what the table is of."""
        epochs = count_of(int(number(self.recipe.get("epochs")) or 0), "epoch")
        return f"{self.title}: {count_of(len(self.seeds), 'seed')}, {epochs}, 95 % confidence intervals"


def read_comparison(path: "str | Path") -> ComparisonResult:
    """Reads what a comparison found, from its folder or from a results file.

    Raises:
        DataError: If it is missing, damaged or no comparison.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    file = path / RESULTS if folder else path
    return ComparisonResult.from_json(read_json(file, follow=folder is None), str(file), folder=folder)


def title(recipe: Json) -> str:
    """What is trained on what, for a heading."""
    return str(recipe.get("experiment") or f"{recipe.get('data', '?')}, {recipe.get('model', '?')}")


def _settled(rows: Sequence[Row], metrics: ByLabel) -> list[Row]:
    """The rows without what a diverged seed makes void: before flatmin noticed divergence, files had that too."""
    found = [max(row.diverged, sum(map(is_diverged, metrics.get(row.label, {}).values()))) for row in rows]
    settled = [row.with_diverged(count) for row, count in zip(rows, found, strict=True)]
    return [settled[0], *(row.without_difference() for row in settled[1:])] if found[0] else settled


def _ratios(values: Any) -> dict[str, float]:
    return {label: ratio for label, ratio in _mapping(values).items() if number(ratio)}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _by_label(values: Any) -> dict[str, dict[int, dict[str, float]]]:
    return {
        label: {int(seed): _mapping(found) for seed, found in _mapping(by).items() if seed.isdecimal()}
        for label, by in _mapping(values).items()
    }
