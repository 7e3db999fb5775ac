"""The registry: every method by name, those of flatmin and those registered from outside."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

from ..._checks import check_choice, nearest
from ...errors import InvalidArgumentError
from . import averages, losses, plain, sam_family
from .card import Card, Hyperparameter

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

# Those that are compared where no others are named: what costs nothing, and each of the paper.
COMPARED = ("base", "smoothing", "logit_squeezing", "sam", "saf", "mesa")


@dataclass(frozen=True)
class _Origin:
    """Where a method was registered: the namespace of the module, and the line."""

    namespace: dict[str, Any]
    line: int

    def superseded(self) -> bool:
        """Whether the module has been executed anew since, as an experiment file is by each load, or is gone."""
        module = sys.modules.get(self.namespace["__name__"])
        return module is None or vars(module) is not self.namespace

    def __str__(self) -> str:
        return f"{self.namespace.get('__file__', self.namespace['__name__'])}:{self.line}"


# What is compared by value; everything else that a card holds on to, by identity.
_PLAIN = (str, bytes, int, float, type(None), CodeType)

_origins: dict[str, _Origin] = {}


def register(card: Card) -> None:
    """Adds a method, which then takes part in everything as flatmin's own do, under its name.

    Call it at the top level of an experiment file: the command runs that file before it reads which methods are meant,
    and so does each process that trains. The same card may be registered again, since an experiment file is run several
    times: the last one counts. Same is what has the same fields, functions being compared by their code; and whatever
    a file registers when it is run anew, takes the place of what it registered before.

    Args:
        card: The method.

    Raises:
        InvalidArgumentError: (a ValueError) if another method has the name, or once had it.

    Example:
        >>> register(METHODS["sam"])
        >>> register(Card("sam", "mine", {}, METHODS["base"].assemble))
        Traceback (most recent call last):
            ...
        flatmin.errors.InvalidArgumentError: there is another method 'sam' already, flatmin's own; ...
    """
    if card.name in FORMER_NAMES:
        raise InvalidArgumentError(
            f"{card.name!r} was the name of {FORMER_NAMES[card.name]}, under which old results have it; take another"
        )
    caller = sys._getframe(1)
    known, origin = _methods.get(card.name), _origins.get(card.name)
    if known is not None and known is not card and not _same(known, card) and not (origin and origin.superseded()):
        place = "flatmin's own" if origin is None else f"registered in {origin}"
        raise InvalidArgumentError(
            f"there is another method {card.name!r} already, {place}; give this one a name of its own"
        )
    if known is None or origin is not None:
        _methods[card.name] = card
        _origins[card.name] = _Origin(caller.f_globals, caller.f_lineno)


def _same(one: Card, other: Card) -> bool:
    return all(_essence(getattr(one, each.name)) == _essence(getattr(other, each.name)) for each in fields(Card))


def _essence(value: Any) -> Any:
    """What stays equal when the file that made a value is run again, or a copy of it: of a function, its code."""
    if isinstance(value, functools.partial):
        return "partial", _essence(value.func), _essence(value.args), _essence(value.keywords)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        # A function among what it closes over may close over this one again: of those only the code is compared.
        inner = [cell.__code__ if isinstance(cell, FunctionType) else _essence(cell) for cell in cells]
        return value.__qualname__, value.__code__, _essence((value.__defaults__, value.__kwdefaults__)), inner
    if isinstance(value, type):
        return "type", value.__qualname__
    if isinstance(value, Hyperparameter):
        return value.default, value.kind, value.help
    if isinstance(value, Mapping):
        return {key: _essence(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_essence(item) for item in value]
    return value if isinstance(value, _PLAIN) else id(value)


def get_method(name: str) -> Card:
    """Returns the card of a method.

    Raises:
        InvalidArgumentError: (a ValueError) if there is none of that name; the message names the nearest, or what it is
            called now.

    Example:
        >>> get_method("saf").defaults["lag"]
        3
    """
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
        InvalidArgumentError: (a ValueError) if a name is none of the method's hyperparameters, or two exclude each
            other.

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
    return method.complete({**defaults, **given}, given, epochs)
