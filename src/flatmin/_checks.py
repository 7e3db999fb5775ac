"""Checks of arguments, shared by all that take some."""

import math
import operator
from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from .errors import InvalidArgumentError


def check_integer(name: str, value: int, *, least: int, hint: str = "") -> int:
    """Returns ``value`` as an int if it is an integer, numpy's too, of at least ``least``; a bool is none."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}{hint}")
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
    except (TypeError, ValueError):
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
        raise InvalidArgumentError(f"{name} must be a finite number{bounds}, got {value!r}{hint}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Returns ``value`` if it is one of ``choices``; otherwise the error names the nearest."""
    if value not in choices:
        raise InvalidArgumentError(f"unknown {name} {value!r}{nearest(value, choices)}; there are {', '.join(choices)}")
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
