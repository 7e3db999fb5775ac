"""Checks of arguments, shared by all that take some."""

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import FlatminError, InvalidArgumentError, StateDictError

Anything = TypeVar("Anything")


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
SEED = Bounds(integer=True, least=0, most=2**63 - 1)  # what torch's generators take


def _say(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_integer(name: str, value: int, *, least: int, hint: str = "") -> int:
    """Returns ``value`` as an int if it is an integer, numpy's too, of at least ``least``; a bool is none."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # the second is of a tensor on the meta device
        number = least - 1
    if number < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {shown(value)}{hint}")
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
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is of a tensor of several numbers, or none
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
        raise InvalidArgumentError(f"{name} must be a finite number{bounds}, got {shown(value)}{hint}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Returns ``value`` if it is one of ``choices``; otherwise the error names the nearest."""
    if not isinstance(value, str) or value not in choices:
        close = nearest(value, choices) if isinstance(value, str) else ""
        raise InvalidArgumentError(f"unknown {name} {shown(value)}{close}; there are {', '.join(choices)}")
    return value


def check_one_of(name: str, value: Anything, choices: Sequence[Any], said: str) -> Anything:
    """Returns ``value`` if it is one of the objects in ``choices``, which ``said`` lists."""
    if not any(value is choice for choice in choices):
        raise InvalidArgumentError(f"{name} must be {said}, got {shown(value)}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Returns ``value`` as a bool if it is one, numpy's or that of 0 and 1 too."""
    if not (isinstance(value, int) or type(value).__name__ in ("bool", "bool_")) or value not in (0, 1):
        raise InvalidArgumentError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_module(name: str, value: nn.Module) -> nn.Module:
    """Returns ``value`` if it is a network: an instance, and no class of them."""
    if not isinstance(value, nn.Module):
        raise InvalidArgumentError(f"{name} must be a network, an instance of torch.nn.Module, got {shown(value)}")
    return value


def trains(optimizer: Any, network: nn.Module) -> bool:
    """Whether an optimizer of torch's has a parameter of a network."""
    own = {id(parameter) for parameter in network.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def check_function(name: str, value: Any, what: str, *, otherwise: str = "") -> Any:
    """Returns ``value`` if it can be called, and is no class.

    Args:
        name: Of the argument.
        value: What was given.
        what: What it is a function of, such as ``"of a list of samples"``.
        otherwise: What else it may be, such as ``", or None"``.
    """
    if isinstance(value, type) or not callable(value):
        raise InvalidArgumentError(f"{name} must be a function {what}{otherwise}, got {shown(value)}")
    return value


def check_tensor(name: str, value: Any, *, like: Tensor | None = None, owner: str = "logits") -> Tensor:
    """Returns ``value`` if it is a floating-point tensor. Looks at no values, so that no device is waited for.

    Args:
        name: Of the argument.
        value: What was given.
        like: The tensor whose shape it must have.
        owner: Of which argument that is.
    """
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise InvalidArgumentError(f"{name} must be floating point numbers, got {shown(value)}")
    if like is not None and value.shape != like.shape:
        raise InvalidArgumentError(f"{name} must have the shape of {owner}, {tuple(like.shape)}, got {shown(value)}")
    return value


def check_mask(name: str, value: Any, shape: Sequence[int], *, first: bool = False) -> None:
    """Checks that ``value`` is a bool tensor of a shape; with ``first`` of any number of its first dimensions."""
    found = list(value.shape) if isinstance(value, Tensor) and value.dtype == torch.bool else None
    if found is None or found != list(shape)[: len(found) if first else None]:
        raise InvalidArgumentError(f"{name} must be a bool tensor of shape {tuple(shape)}, got {shown(value)}")


def check_path(name: str, value: Any) -> Path | None:
    """Returns ``value`` as a path, None as it is."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise InvalidArgumentError(f"{name} must be a path, got {shown(value)}")
    return Path(value)


def check_mapping(name: str, value: Any, *keys: str) -> Mapping[Any, Any]:
    """Returns ``value`` if it is a mapping that has ``keys``.

    Raises:
        StateDictError: If it is none, or has not.
    """
    if not isinstance(value, Mapping):
        raise StateDictError(f"{name} must be what state_dict() returned, a dictionary, got {shown(value)}")
    for key in keys:
        if key not in value:
            held = ", ".join(map(shown, list(value)[:5])) or "nothing"
            raise StateDictError(f"{name} has no {key!r}, only {held}: give what state_dict() of the same returned")
    return value


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Inside, a state is loaded: any error of what is in it is a `StateDictError`."""
    try:
        yield
    except FlatminError:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {error}"
        raise StateDictError(f"state_dict does not fit {what}: {' '.join(said.split()):.500}") from error


class Loaded(nn.Module):
    """A module whose ``load_state_dict`` raises a `StateDictError` for whatever is no state of it."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what ``state_dict`` returned, as torch's modules do.

        Raises:
            StateDictError: (a ValueError and a RuntimeError) If it is none, or of another module.
        """
        check_mapping("state_dict", state_dict)
        with loading(f"this {type(self).__name__}"):
            return super().load_state_dict(state_dict, strict, assign)


def check_counts(name: str, state: Any, sizes: Sequence[int]) -> list[int]:
    """Returns the integers of at least 0 in a state that was saved as a tensor.

    Args:
        name: Of the argument.
        state: What was given: a tensor, or what a format has made of it.
        sizes: How many there may be.
    """
    try:
        values = state.flatten().tolist() if isinstance(state, Tensor) else list(state)
        found = [int(value) for value in values]
    except (TypeError, RuntimeError, ValueError, OverflowError):
        values, found = [], []
    if found != values or len(found) not in sizes or min(found) < 0:
        wanted = " or ".join(map(str, sizes))
        raise StateDictError(f"{name} must be what get_extra_state() returned, {wanted} integers, got {shown(state)}")
    return found


def shown(value: object) -> str:
    """A value in a line of an error: a tensor by its dtype and shape, a module by its class, all else as its repr."""
    if isinstance(value, Tensor) and value.ndim:
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    try:
        said = " ".join(repr(value).split())
    except Exception:
        said = type(value).__name__
    return f"{said:.100}"


def nearest(value: str, choices: Sequence[str], *, prefix: str = "") -> str:
    """Returns ``", did you mean ...?"`` for a misspelt value, each choice after ``prefix``, or nothing."""
    close = [prefix + choice for choice in get_close_matches(value.lower(), choices, n=2)]
    return f", did you mean {' or '.join(close)}?" if close else ""
