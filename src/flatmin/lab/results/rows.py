"""The rows of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .values import count_of, number, numbers, say_bytes

Json = Mapping[str, Any]
_NUMBERS = ("p_value", "p_value_holm", "step_ratio", "step_seconds", "extra_bytes")
HEADINGS = ("method", "test accuracy %", "paired difference", "time/step", "extra memory")


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % confidence interval, None where there is none."""

    mean: float
    half: float | None = None

    @classmethod
    def from_json(cls, values: Any) -> "Interval | None":
        """Takes ``{"mean": ..., "half": ...}``; None if it has no finite mean."""
        mean = number(values.get("mean")) if isinstance(values, Mapping) else None
        return None if mean is None else cls(mean, number(values.get("half")))

    def say(self, *, signed: bool = False) -> str:
        """Mean ± half width, in percent or points."""
        mean = f"{self.mean:+.2f}" if signed else f"{self.mean:.2f}"
        return mean if self.half is None else f"{mean} ± {self.half:.2f}"


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

    @classmethod
    def from_json(cls, values: Json) -> "Row":
        """Takes what `to_json` returned; what is missing or no number becomes None."""
        found = {name: number(values.get(name)) for name in _NUMBERS}
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
        )

    def with_diverged(self, seeds: int) -> "Row":
        """Returns this row with so many of its seeds diverged, and if that is any without what they make void."""
        row = replace(self, diverged=seeds)
        return row.without_difference(accuracy=None) if seeds else row

    def without_difference(self, **changes: Any) -> "Row":
        """Returns this row with nothing said on its difference to the base, and other changes."""
        return replace(self, difference=None, p_value=None, p_value_holm=None, **changes)

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
        for name, p in (("p_value", self.p_value), ("p_value_holm", self.p_value_holm)):
            values |= {} if p is None else {name: p}
        return values

    def say_diverged(self) -> str:
        """How many of the seeds diverged, such as ``"diverged"`` for all, or ``"diverged (2 of 5 seeds)"``."""
        seeds = len(self.test_accuracy)
        return "diverged" if self.diverged >= seeds else f"diverged ({self.diverged} of {count_of(seeds, 'seed')})"

    def cells(self) -> list[str]:
        """The row as text, a cell for each of `HEADINGS`."""
        is_base = self.p_value_holm is None
        return [
            self.label,
            self.say_diverged() if self.diverged else "" if self.accuracy is None else self.accuracy.say(),
            "" if self.difference is None or is_base else self.difference.say(signed=True),
            "-" if self.step_ratio is None else f"{self.step_ratio:.2f}x",
            "-" if self.extra_bytes is None else say_bytes(self.extra_bytes),
        ]
