"""Numbers and what they mean, as people say them."""

from collections.abc import Sequence

from ._study import Interval

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
    if interval is None:
        return NONE
    mean = f"{interval.mean:+.2f}" if signed else f"{interval.mean:.2f}"
    return mean if interval.half is None else f"{mean} ± {interval.half:.2f}"


def say_bytes(count: float | None) -> str:
    """A number of bytes in a fitting unit, of 1000 each; a dash for None.

    Example:
        >>> from flatmin.lab.report._words import say_bytes
        >>> say_bytes(999), say_bytes(96232)
        ('999 B', '96.2 kB')
    """
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def say_p(value: float | None) -> str:
    """A p-value to three decimals; a dash for None."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count_of(count: int, word: str) -> str:
    """A number with its noun, in the plural where it takes one."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Words with commas, and the last with ``and``."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
