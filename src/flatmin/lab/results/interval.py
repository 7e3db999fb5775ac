"""A mean with its confidence interval, and a measure that is compared with the base's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .values import number, numbers


def say_points(value: float) -> str:
    """A difference in points with its sign; none but for rounding is ``+0.00``.

    Example:
        >>> from flatmin.lab.results.interval import say_points
        >>> say_points(-0.25), say_points(-1e-6)
        ('-0.25', '+0.00')
    """
    return f"{round(value, 2) + 0.0:+.2f}"


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
        mean = say_points(self.mean) if signed else f"{self.mean:.2f}"
        return mean if self.half is None else f"{mean} ± {self.half:.2f}"


@dataclass(frozen=True)
class Compared:
    """What a row has of a measure beside its accuracy, and how that differs from the base's.

    Attributes:
        values: In percent: one for each seed that every row has finished.
        mean: Of these.
        difference: Mean difference to the base, paired by seed, in points.
        p_value: Of the paired t-test of that difference, two-sided.
        p_value_holm: The same, corrected by Holm for all rows and all such measures; None for the base.
    """

    values: Sequence[float] = ()
    mean: Interval | None = None
    difference: Interval | None = None
    p_value: float | None = None
    p_value_holm: float | None = None

    @classmethod
    def from_json(cls, values: Any) -> "Compared":
        """Takes what `to_json` returned; what is missing or no number becomes None."""
        found = values if isinstance(values, Mapping) else {}
        return cls(
            [value for value in numbers(found.get("values")) if value is not None],
            Interval.from_json(found.get("mean")),
            Interval.from_json(found.get("difference")),
            number(found.get("p_value")),
            number(found.get("p_value_holm")),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def say(self) -> str:
        """Mean, and the difference to the base if there is one."""
        if self.mean is None:
            return "-"
        if self.difference is None or self.p_value_holm is None:
            return f"{self.mean.mean:.2f}"
        return f"{self.mean.mean:.2f} ({say_points(self.difference.mean)})"
