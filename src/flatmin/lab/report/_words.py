"""Numbers and what they mean, as people say them."""

from ..results import Interval
from ..results.values import say_bytes

NONE = "\N{EN DASH}"  # where there is no number


def say(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for None.

    Example:
        >>> from flatmin.lab.report._words import say
        >>> say(0.0123456), say(1234567.0)
        ('0.01235', '1.235e+06')
    """
    return NONE if value is None else f"{value:.{digits}g}"


def say_interval(interval: Interval | None, *, signed: bool = False) -> str:
    """Mean ± half width in percent or points; a dash for None."""
    return NONE if interval is None else interval.say(signed=signed)


def say_size(count: float | None) -> str:
    """A number of bytes in a fitting unit; a dash for None."""
    return NONE if count is None else say_bytes(count)


def say_p(value: float | None) -> str:
    """A p-value to three decimals; a dash for None."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
