"""The registry: every method by name, those of flatmin and those registered from outside."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from ..._checks import check_choice, nearest
from ...errors import InvalidArgumentError
from . import averages, losses, plain, private, sam_family
from .card import Card
from .stand_in import check_settings

# Names that methods once had, under which committed results have them.
FORMER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "samon": "sam_on",
        "latesam": "late_sam",
        "aesam": "ae_sam",
        "looksam": "look_sam",
        "fsam": "friendly_sam",
        "ols": "online_label_smoothing",
        "squeeze": "logit_squeezing",
        "sema": "switch_ema",
    }
)

_methods: dict[str, Card] = {
    card.name: card for card in (*plain.CARDS, *sam_family.CARDS, *losses.CARDS, *averages.CARDS)
}

# What `register` puts in is seen here.
METHODS: Mapping[str, Card] = MappingProxyType(_methods)

# Those that train with differential privacy alone, which `get_method` knows too.
PRIVATE: Mapping[str, Card] = MappingProxyType({card.name: card for card in private.CARDS})

# Those that are compared where no others are named: what costs nothing, and each of the paper.
COMPARED = ("base", "smoothing", "logit_squeezing", "sam", "saf", "mesa")


INTERACTIVE = "an interactive session"  # a notebook's cell or a prompt, where a name is given again at will


@dataclass(frozen=True)
class _Origin:
    """Where a method was registered: the file, its content, the line, and the execution of the file."""

    file: str
    digest: str
    line: int
    execution: int

    @classmethod
    def of(cls, frame: FrameType) -> "_Origin":
        """The place in the code that ``frame`` is at."""
        file = frame.f_globals.get("__file__", INTERACTIVE)
        with suppress(OSError):
            return cls(file, sha256(Path(file).read_bytes()).hexdigest(), frame.f_lineno, id(frame.f_globals))
        return cls(file, "", frame.f_lineno, id(frame.f_globals))

    def may_replace(self, other: "_Origin") -> bool:
        """Whether it is the same line of the file, or of a copy (a run's folder has one), or the file run anew."""
        copied = self.digest != "" and self.digest == other.digest
        if self.file != other.file:
            return copied and self.line == other.line
        return self.line == other.line or self.execution != other.execution or self.file == INTERACTIVE


_origins: dict[str, _Origin] = {}  # of the methods that are not flatmin's own


def register(card: Card) -> None:
    """Adds a method, which then takes part in everything as flatmin's own do, under its name.

    Call it at the top level of an experiment file: the command runs that file before it reads which methods are meant,
    and so does each process that trains. What a file registers when it runs again replaces what it registered before.

    Args:
        card: The method.

    Raises:
        InvalidArgumentError: (a ValueError) if flatmin itself has or had a method of that name, or another file, or
            another line of the same file, has registered one.

    Example:
        >>> register(Card("sam", "mine", {}, METHODS["base"].assemble))
        Traceback (most recent call last):
            ...
        flatmin.errors.InvalidArgumentError: there is a method 'sam' already, flatmin's own; ...
    """
    if not isinstance(card, Card):
        raise InvalidArgumentError(f"card must be a flatmin.lab.methods.Card, got {card!r:.80}")
    if card.name in FORMER_NAMES:
        raise InvalidArgumentError(
            f"{card.name!r} was the name of {FORMER_NAMES[card.name]}, under which old results have it; take another"
        )
    here = _Origin.of(sys._getframe(1))
    known = _origins.get(card.name)
    if card.name in PRIVATE or (card.name in _methods and (known is None or not here.may_replace(known))):
        place = "flatmin's own" if known is None else f"registered in {known.file}, line {known.line}"
        raise InvalidArgumentError(f"there is a method {card.name!r} already, {place}; give this one another name")
    _methods[card.name], _origins[card.name] = card, here


def get_method(name: str) -> Card:
    """Returns the card of a method.

    Raises:
        InvalidArgumentError: (a ValueError) if there is none of that name; the message names the nearest, or what it is
            called now.

    Example:
        >>> get_method("saf").defaults["lag"]
        3
    """
    if name in PRIVATE:
        return PRIVATE[name]
    if name not in _methods and name in FORMER_NAMES:
        raise InvalidArgumentError(f"unknown method {name!r}; it is now {FORMER_NAMES[name]}")
    return _methods[check_choice("method", name, tuple(_methods))]


def resolve_settings(method: Card, given: Mapping[str, Any], *, epochs: int) -> dict[str, Any]:
    """Fills in a method's defaults.

    Args:
        method: The method.
        given: Hyperparameters that differ from its defaults.
        epochs: Length of the run, to which some defaults are tied.

    Raises:
        InvalidArgumentError: (a ValueError) if a name is none of the method's hyperparameters, a value is out of its
            bounds, or two exclude each other.

    Example:
        >>> resolve_settings(METHODS["ema"], {}, epochs=60)["ema_epochs"]
        12.0
    """
    defaults = method.defaults
    for name in given:
        if name not in defaults:
            raise InvalidArgumentError(
                f"{method.name} has no hyperparameter {name!r}{nearest(name, tuple(defaults))}; "
                f"it has {', '.join(defaults)}"
            )
    settings = method.complete({**defaults, **given}, given, epochs)
    check_settings(method, settings, epochs, own=method.name not in _origins)
    return settings
