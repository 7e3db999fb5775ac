"""Checks of arguments, shared by all that take some."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from .errors import InvalidArgumentError


@dataclass(frozen=True)
class Bounds:
    """What a number may be: `check` refuses all else, and as a text it is what a help says.

    Args:
        integer: Whether it must be an integer.
        least: At least.
        above: More than.
        below: Less than.
        most: At most; by default what 32 bits can count, or float32 can hold.
        hint: Added to the error.
    """

    integer: bool = False
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    hint: str = ""

    @property
    def highest(self) -> float | None:
        """The highest value, itself allowed; None where ``below`` bounds it."""
        if self.most is not None or self.below is not None:
            return self.most
        return MOST_COUNT if self.integer else MOST_NUMBER

    def check(self, name: str, value: float) -> float:
        """Returns ``value`` if it is within the bounds, as an int if ``integer``.

        Raises:
            InvalidArgumentError: (a ValueError) otherwise.
        """
        if self.integer:
            number: float = check_integer(name, value, least=int(self.least or 0), hint=self.hint)  # type: ignore[arg-type]
        else:
            # The bound that has a reason of its own is said where it is broken; the highest is far from all use.
            near = self.most if self.most is not None and self.most <= 1 else None
            number = check_number(
                name, value, least=self.least, above=self.above, below=self.below, most=near, hint=self.hint
            )
        if self.highest is not None and number > self.highest:
            raise InvalidArgumentError(f"{name} must be at most {_say(self.highest)}, got {value!r:.60}{self.hint}")
        return number

    def __str__(self) -> str:
        low = f"> {_say(self.above)}" if self.above is not None else ""
        low = f">= {_say(self.least)}" if self.least is not None else low
        high = f"< {_say(self.below)}" if self.below is not None else f"<= {_say(self.highest or 0)}"
        return " and ".join(part for part in (low, high) if part)


MOST_COUNT = 2**31 - 1
MOST_NUMBER = 3.4e38


def _say(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_integer(name: str, value: int, *, least: int, hint: str = "") -> int:
    """Returns ``value`` as an int if it is an integer, numpy's too, of at least ``least``; a bool is none."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r:.100}{hint}")
    return number


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> float:
    """Returns ``value`` as a float if it is finite and within the bounds given (``above`` and ``below`` exclude)."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    wanted = [f"> {above:g}"] if above is not None else []
    wanted += [f">= {least:g}"] if least is not None else []
    wanted += [f"< {below:g}"] if below is not None else []
    wanted += [f"<= {most:g}"] if most is not None else []
    fits = (
        math.isfinite(number)
        and (above is None or number > above)
        and (least is None or number >= least)
        and (below is None or number < below)
        and (most is None or number <= most)
    )
    if not fits:
        bounds = f" {' and '.join(wanted)}" if wanted else ""
        raise InvalidArgumentError(f"{name} must be a finite number{bounds}, got {value!r:.100}{hint}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Returns ``value`` if it is one of ``choices``; otherwise the error names the nearest."""
    if value not in choices:
        raise InvalidArgumentError(
            f"unknown {name} {value!r:.100}{nearest(value, choices)}; there are {', '.join(choices)}"
        )
    return value


def check_module(name: str, value: nn.Module) -> nn.Module:
    """Returns ``value`` if it is a network: an instance, and no class of them."""
    if not isinstance(value, nn.Module):
        raise InvalidArgumentError(f"{name} must be a network, an instance of torch.nn.Module, got {value!r}")
    return value


def nearest(value: str, choices: Sequence[str], *, prefix: str = "") -> str:
    """Returns ``", did you mean ...?"`` for a misspelt value, each choice after ``prefix``, or nothing."""
    close = [prefix + choice for choice in get_close_matches(value.lower(), choices, n=2)]
    return f", did you mean {' or '.join(close)}?" if close else ""
