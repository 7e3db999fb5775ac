"""What a comparison compares, what it found, and what that means."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import InvalidArgumentError
from ..methods import get_method, resolve_settings
from ..recipe import Recipe
from .stats import holm, interval, paired_p_value

LEAST_SEEDS = 5  # for a claim


@dataclass(frozen=True)
class Row:
    """One row of a comparison: a method with one setting of its hyperparameters."""

    label: str
    method: str
    settings: Mapping[str, Any]


@dataclass
class Outcome:
    """What a comparison has found so far.

    Attributes:
        recipe: What the methods share.
        rows: The methods; the first is the base that the others are compared with.
        metrics: For each row's label, the last epoch's metrics by seed.
        step_ratio: For each label, the median ratio of its step's time to the base's; of one that pays.
        plain_ratio: For each label of which not all steps pay for a second pass, that of the others.
        step_seconds: For each label, the median time of a step that pays.
        extra_bytes: For each label, what it keeps in memory beyond the base optimizer.
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

    @property
    def seeds(self) -> list[int]:
        """The seeds that every row has finished."""
        finished = [set(self.metrics.get(row.label, {})) for row in self.rows]
        return sorted(set.intersection(*finished)) if finished else []

    def accuracies(self, label: str) -> list[float]:
        """Test accuracy after the last epoch, in percent, for each of `seeds`."""
        return [100 * self.metrics[label][seed]["test_accuracy"] for seed in self.seeds]

    def mean_step_ratio(self, row: Row) -> float | None:
        """The mean ratio of a row's steps to the base's, by how many of them paid; None where it was not measured."""
        paying, plain = self.step_ratio.get(row.label), self.plain_ratio.get(row.label)
        if paying is None or plain is None or not self.seeds:
            return paying
        calls = [self.metrics[row.label][seed]["mean_closure_calls"] for seed in self.seeds]
        share = (math.fsum(calls) / len(calls) - 1) / (get_method(row.method).closure_calls - 1)
        return share * paying + (1 - share) * plain

    def table(self) -> list[dict[str, Any]]:
        """One dictionary a row: accuracies, their interval, paired difference to the base, p-value, cost."""
        base = self.accuracies(self.rows[0].label)
        table = []
        for row in self.rows:
            accuracies = self.accuracies(row.label)
            differences = [ours - theirs for ours, theirs in zip(accuracies, base, strict=True)]
            entry: dict[str, Any] = {
                "label": row.label,
                "method": row.method,
                "settings": dict(row.settings),
                "test_accuracy": accuracies,
                "step_ratio": self.mean_step_ratio(row),
                "step_seconds": self.step_seconds.get(row.label),
                "extra_bytes": self.extra_bytes.get(row.label),
            }
            if accuracies:
                entry["accuracy"] = asdict(interval(accuracies))
                entry["difference"] = asdict(interval(differences))
                entry["p_value"] = paired_p_value(differences)
            table.append(entry)
        if base:
            for entry, adjusted in zip(table[1:], holm([entry["p_value"] for entry in table[1:]]), strict=True):
                entry["p_value_holm"] = adjusted
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything, with every seed's numbers; runs of seeds that not every row has finished come as ``partial``."""
        seeds = self.seeds
        return {
            "recipe": asdict(self.recipe),
            "base": self.rows[0].label,
            "seeds": seeds,
            "interrupted": self.interrupted,
            "verdict": verdict(self),
            "rows": self.table(),
            "plain_step_ratio": self.plain_ratio,
            "selection": self.selection,
            "metrics": {label: {str(seed): by_seed[seed] for seed in seeds} for label, by_seed in self.metrics.items()},
            "partial": {
                label: {str(seed): values for seed, values in by_seed.items() if seed not in seeds}
                for label, by_seed in self.metrics.items()
            },
        }


def make_rows(methods: Sequence[str], settings: Mapping[str, Mapping[str, Sequence[Any]]], *, epochs: int) -> list[Row]:
    """Makes the rows of a comparison: every method in every combination of the settings given for it.

    Args:
        methods: Names from the registry. The first row that stands for ``base`` becomes the base; there must be one.
        settings: For a method, for a hyperparameter, the values to try.
        epochs: Length of the runs, to which some defaults are tied.

    Raises:
        InvalidArgumentError: If a method or hyperparameter is unknown, twice there, or ``base`` is missing.
    """
    if len(set(methods)) != len(methods):
        raise InvalidArgumentError(f"methods names one twice: {', '.join(methods)}; for several settings use --set")
    for name in settings:
        get_method(name)
        if name not in methods:
            raise InvalidArgumentError(
                f"a setting is given for {name}, which is not among the methods {', '.join(methods)}"
            )
    if "base" not in methods:
        raise InvalidArgumentError("methods must include base, with which the others are compared")
    rows = []
    for name in sorted(methods, key=lambda method: method != "base"):  # the base first, the others as they come
        tried = settings.get(name, {})
        for values in itertools.product(*tried.values()):
            given = dict(zip(tried, values, strict=True))
            label = " ".join([name, *(f"{key}={_say(value)}" for key, value in given.items())])
            rows.append(Row(label, name, resolve_settings(get_method(name), given, epochs=epochs)))
    labels = [row.label for row in rows]
    if len(set(labels)) != len(labels):
        raise InvalidArgumentError(f"a setting is given twice: the rows are {', '.join(labels)}")
    return rows


def _say(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.15g}"


def verdict(outcome: Outcome) -> str:
    """Says in plain words which methods are better than the base beyond noise, and at what cost.

    A method counts as better or worse if its paired difference is significant at 5 %, two-sided, after Holm's
    correction for the number of methods compared. From fewer than 5 seeds nothing is claimed: accuracies are counts of
    samples, so that a few differences are often equal by chance, which looks like certainty.
    """
    table = outcome.table()
    count = len(outcome.seeds)
    others = table[1:]
    if not others:
        return f"{table[0]['label']} alone: there is nothing to compare it with."
    if count < LEAST_SEEDS:
        return f"{count} finished seed{'s' if count != 1 else ''}: too few for a claim, which takes {LEAST_SEEDS}."
    better: list[str] = []
    worse: list[str] = []
    open_: list[str] = []
    for entry in others:
        significant = entry["p_value_holm"] < 0.05
        mean = entry["difference"]["mean"]
        text = f"{entry['label']} ({mean:+.2f} points"
        if entry["step_ratio"] is not None:
            text += f" at {entry['step_ratio']:.2f} times the step"
        (better if significant and mean > 0 else worse if significant else open_).append(text + ")")
    sentences = [f"Better than {table[0]['label']} beyond noise here: {', '.join(better) or 'none'}."]
    if worse:
        sentences.append(f"Worse: {', '.join(worse)}.")
    if open_:
        sentences.append(f"Not told apart from it: {', '.join(open_)}.")
    sentences.append(
        f"(Paired over {count} seeds, two-sided t-test at 5 %, Holm-corrected for {len(others)} "
        f"comparison{'s' if len(others) != 1 else ''}; this data, network and recipe only.)"
    )
    return " ".join(sentences)
