"""The rows of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .interval import Compared, Interval
from .values import count_of, number, numbers

Json = Mapping[str, Any]
_NUMBERS = ("p_value", "p_value_holm", "step_ratio", "step_seconds", "extra_bytes", "epsilon")


@dataclass(frozen=True)
class Row:
    """One row of a comparison: a method with its hyperparameters and, once it has been trained, what was found.

    Attributes:
        label: Its name, unique in the comparison.
        method: Name of the method.
        settings: All hyperparameters of the method.
        test_accuracy: In percent, after the last epoch: one value for each seed that every row has finished.
        accuracy: Mean of these.
        difference: Mean difference to the base, paired by seed, in points.
        p_value: Of the paired t-test of that difference, two-sided.
        p_value_holm: The same, corrected by Holm for the number of rows; None for the base.
        step_ratio: Time per step as a multiple of the base's, mean over all steps of the run.
        step_seconds: Time of a step in seconds; where only some steps have a second pass, of one that has.
        extra_bytes: Memory that the method needs beyond the base optimizer, in bytes.
        diverged: How many of these seeds ended with a test loss that is infinite or not a number. A row with any has no
            accuracy and no difference: a mean over the seeds that are left would be of the lucky ones.
        epsilon: Privacy that was spent, the most over these seeds; None without.
        after: What was measured after training, by the names of `flatmin.lab.results.after.AFTER`, if it was.
    """

    label: str
    method: str = ""
    settings: Json = field(default_factory=dict)
    test_accuracy: Sequence[float] = ()
    accuracy: Interval | None = None
    difference: Interval | None = None
    p_value: float | None = None
    p_value_holm: float | None = None
    step_ratio: float | None = None
    step_seconds: float | None = None
    extra_bytes: float | None = None
    diverged: int = 0
    epsilon: float | None = None
    after: Mapping[str, Compared] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Json) -> "Row":
        """Takes what `to_json` returned; what is missing or no number becomes None."""
        found, after = {name: number(values.get(name)) for name in _NUMBERS}, values.get("after")
        return cls(
            values["label"],
            str(values.get("method", "")),
            values["settings"] if isinstance(values.get("settings"), dict) else {},
            [value for value in numbers(values.get("test_accuracy")) if value is not None],
            Interval.from_json(values.get("accuracy")),
            Interval.from_json(values.get("difference")),
            found["p_value"],
            found["p_value_holm"],
            found["step_ratio"],
            found["step_seconds"],
            found["extra_bytes"],
            int(number(values.get("diverged")) or 0),
            found["epsilon"],
            {name: Compared.from_json(each) for name, each in after.items()} if isinstance(after, dict) else {},
        )

    def with_diverged(self, seeds: int) -> "Row":
        """Returns this row with so many of its seeds diverged, and if that is any without what they make void."""
        row = replace(self, diverged=seeds)
        return row.without_difference(accuracy=None, after={}) if seeds else row

    def without_difference(self, **changes: Any) -> "Row":
        """Returns this row with nothing said on its difference to the base, and other changes."""
        nothing: dict[str, Any] = {"difference": None, "p_value": None, "p_value_holm": None}
        after = {name: replace(each, **nothing) for name, each in self.after.items()}
        return replace(self, **{**nothing, "after": after, **changes})

    def setting_json(self) -> dict[str, Any]:
        """What is trained, without what was found."""
        return {"label": self.label, "method": self.method, "settings": dict(self.settings)}

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; intervals and p-values are left out where there are none."""
        values = self.setting_json() | {
            "test_accuracy": list(self.test_accuracy),
            "step_ratio": self.step_ratio,
            "step_seconds": self.step_seconds,
            "extra_bytes": self.extra_bytes,
            "diverged": self.diverged,
        }
        for name, interval in (("accuracy", self.accuracy), ("difference", self.difference)):
            values |= {} if interval is None else {name: asdict(interval)}
        for name, each in (("p_value", self.p_value), ("p_value_holm", self.p_value_holm), ("epsilon", self.epsilon)):
            values |= {} if each is None else {name: each}
        return values | ({"after": {name: each.to_json() for name, each in self.after.items()}} if self.after else {})

    def say_diverged(self) -> str:
        """How many of the seeds diverged, such as ``"diverged"`` for all, or ``"diverged (2 of 5 seeds)"``."""
        seeds = len(self.test_accuracy)
        return "diverged" if self.diverged >= seeds else f"diverged ({self.diverged} of {count_of(seeds, 'seed')})"
