"""The rows of a comparison, before anything is trained."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidArgumentError
from ..methods import get_method, resolve_settings
from ..results import Row

LONGEST = 200  # characters of a label, which names a folder


def make_rows(methods: Sequence[str], settings: Mapping[str, Mapping[str, Sequence[Any]]], *, epochs: int) -> list[Row]:
    """Makes the rows of a comparison: each method with every combination of the values given for it.

    Args:
        methods: Names of methods; ``"base"`` must be one, and its first row is the base of the comparison.
        settings: For a method, for a hyperparameter, the values to try.
        epochs: Length of the runs, to which some defaults are tied.

    Raises:
        InvalidArgumentError: If a method or hyperparameter is unknown or given twice, or ``base`` is missing.
    """
    if isinstance(methods, str):
        raise InvalidArgumentError(f"methods must be a list of names, got {methods!r}; write {methods.split(',')!r}")
    if len(set(methods)) != len(methods):
        raise InvalidArgumentError(
            f"methods has a name twice: {', '.join(methods)}; give several values of a hyperparameter instead"
        )
    for name in settings:
        get_method(name)
        if name not in methods:
            raise InvalidArgumentError(
                f"a setting is given for {name}, which is not among the methods {', '.join(methods)}"
            )
    if "base" not in methods:
        raise InvalidArgumentError("methods must include base, with which the others are compared")
    rows = []
    for name in sorted(methods, key=lambda method: method != "base"):  # the base first, the others as they come
        tried = settings.get(name, {})
        for values in itertools.product(*tried.values()):
            given = dict(zip(tried, values, strict=True))
            label = " ".join([name, *(f"{key}={_say(value)}" for key, value in given.items())])
            rows.append(Row(label, name, resolve_settings(get_method(name), given, epochs=epochs)))
    for row in rows:
        if len(row.label) > LONGEST or "/" in row.label or "\0" in row.label:
            raise InvalidArgumentError(
                f"a row names a folder, so it must be without / and of at most {LONGEST} characters, got "
                f"{row.label!r:.60}"
            )
    labels = [row.label for row in rows]
    if len(set(labels)) != len(labels):
        raise InvalidArgumentError(f"a setting is given twice: the rows are {', '.join(labels)}")
    return rows


def _say(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.15g}"
