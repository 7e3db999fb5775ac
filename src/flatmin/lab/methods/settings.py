"""Hyperparameters as they are typed: ``METHOD.NAME=VALUE[,VALUE...]`` of several methods, ``NAME=VALUE`` of one."""

from collections.abc import Sequence
from typing import Any

from ...errors import InvalidArgumentError
from .card import Card
from .registry import get_method, resolve_settings


def parse_settings(texts: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Reads the values of ``flatmin compare --set``: for a method, for a hyperparameter, the values to try.

    Args:
        texts: Each ``METHOD.NAME=VALUE``, or ``METHOD.NAME=VALUE,VALUE`` for several values.

    Raises:
        InvalidArgumentError: (a ValueError) if one cannot be read, or names what there is not.

    Example:
        >>> parse_settings(["saf.coefficient=0.3,0.8", "saf.lag=2"])
        {'saf': {'coefficient': [0.3, 0.8], 'lag': [2]}}
    """
    settings: dict[str, dict[str, list[Any]]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        method, dot, hyperparameter = name.partition(".")
        if not (equals and dot and values):
            raise InvalidArgumentError(f"--set {text!r} must look like saf.coefficient=0.8 or saf.coefficient=0.3,0.8")
        read = [_read(text, get_method(method), hyperparameter, value) for value in values.split(",")]
        settings.setdefault(method, {}).setdefault(hyperparameter, []).extend(read)
    return settings


def parse_own_settings(method: Card, texts: Sequence[str]) -> dict[str, Any]:
    """Reads the values of ``flatmin train --set``: of one method, one value each.

    Args:
        method: The method.
        texts: Each ``NAME=VALUE``.

    Raises:
        InvalidArgumentError: (a ValueError) if one cannot be read, is given twice, or names what there is not.

    Example:
        >>> from flatmin.lab.methods import METHODS
        >>> parse_own_settings(METHODS["saf"], ["coefficient=0.8"])
        {'coefficient': 0.8}
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise InvalidArgumentError(f"--set {text!r} must look like coefficient=0.8")
        if name in settings:
            raise InvalidArgumentError(f"--set gives {name} twice: one run has one value of it")
        settings[name] = _read(text, method, name, value)
    return settings


def _read(text: str, method: Card, name: str, value: str) -> Any:
    if name not in method.hyperparameters:
        resolve_settings(method, {name: 0}, epochs=1)  # says what there is
    hyperparameter = method.hyperparameters[name]
    try:
        return hyperparameter.read(value)
    except ValueError:
        wanted = "an integer" if hyperparameter.kind is int else "a number"
        raise InvalidArgumentError(f"--set {text!r}: {name} must be {wanted}, got {value!r}") from None
