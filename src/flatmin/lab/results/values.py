"""Numbers as they come from JSON, and as people say them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> float | None:
    """Returns a finite number as a float, and None for anything else.

    Example:
        >>> from flatmin.lab.results.values import number
        >>> number(3), number(float("nan")), number(True), number("3")
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def is_diverged(metrics: Mapping[str, Any]) -> bool:
    """Whether a run had diverged at the end of an epoch: its test loss is infinite or not a number, None in JSON.

    Args:
        metrics: Of that epoch; without a test loss nothing is known.

    Example:
        >>> from flatmin.lab.results.values import is_diverged
        >>> is_diverged({"test_loss": 0.3}), is_diverged({"test_loss": None}), is_diverged({})
        (False, True, False)
    """
    return "test_loss" in metrics and number(metrics["test_loss"]) is None


def numbers(values: Any) -> list[float | None]:
    """Returns a list's items, those that are not finite numbers as None; an empty list for anything else."""
    return [number(value) for value in values] if isinstance(values, list) else []


def say_bytes(count: float) -> str:
    """A number of bytes in a fitting unit, each 1000 times the one before.

    Example:
        >>> from flatmin.lab.results.values import say_bytes
        >>> say_bytes(999), say_bytes(96232)
        ('999 B', '96.2 kB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def count_of(count: int, word: str) -> str:
    """A number with its noun, in the plural where it takes one."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Words with commas, and the last with ``and``."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
