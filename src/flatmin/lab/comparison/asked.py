"""What is asked of a comparison: the bounds of its numbers, and its rows."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..._checks import Bounds
from ...errors import InvalidArgumentError
from ..methods import COMPARED, get_method
from ..methods import private as privacy
from ..problems.load import import_experiment
from ..recipe import Recipe
from ..results import Row
from .rows import make_rows
from .run import MOST_SEEDS

BOUNDS = {  # of the arguments, and of the command's options
    "seeds": Bounds(integer=True, least=1, most=MOST_SEEDS),
    "select": Bounds(integer=True, least=1, most=10_000),
    "look": Bounds(integer=True, least=0, most=10_000),
    "minutes": Bounds(above=0, most=525_600),  # a year
    "jobs": Bounds(integer=True, least=1, most=1024),
}

_log = logging.getLogger("flatmin")


def check_numbers(*, seeds: int | None, select: int | None, look: int, minutes: float, jobs: int | None) -> None:
    """Checks the numbers among the arguments of `compare`, which may be None.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its `BOUNDS`.
    """
    given = {"seeds": seeds, "select": select, "look": look, "minutes": minutes, "jobs": jobs}
    for name, value in given.items():
        if value is not None:
            BOUNDS[name].check(name, value)
    if look == 1:
        raise InvalidArgumentError("look must be at least 2 points along each direction, or 0, got 1")


def asked_rows(
    recipe: Recipe, methods: Sequence[str] | None, settings: Mapping[str, Mapping[str, Any]], *, several: bool
) -> list[Row]:
    """The rows of a comparison.

    Args:
        recipe: What they share; its experiment file is run.
        methods: As for `compare`.
        settings: As for `compare`.
        several: Whether some method must have several rows, to choose from.

    Raises:
        FlatminError: If there can be none such.
    """
    experiment = import_experiment(recipe)  # which may register methods
    names = _default_methods(recipe, experiment) if methods is None else methods
    given = _each_a_list(settings)
    if recipe.private is not None and methods is None:
        given = {**privacy.ROWS, **given}
    rows = make_rows(names, given, epochs=recipe.epochs)
    for row in rows:
        privacy.check_privacy(row.label, get_method(row.method), row.settings, private=recipe.private is not None)
    if several and len(rows) == len(names):
        raise InvalidArgumentError(
            "select has nothing to choose from: give a hyperparameter several values, such as --set "
            "saf.coefficient=0.3,0.8"
        )
    return rows


def _default_methods(recipe: Recipe, experiment: Any) -> list[str]:
    """Those compared by default; without label smoothing where it cannot be, on a criterion of the user's own."""
    compared = COMPARED if recipe.private is None else privacy.COMPARED
    if not hasattr(experiment, "criterion"):
        return list(compared)
    _log.info("%s has its own criterion(), so smoothing is left out", recipe.experiment)
    return [name for name in compared if name != "smoothing"]


def _each_a_list(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Sequence[Any]]]:
    """Settings by method and hyperparameter, each value as a list.

    Raises:
        InvalidArgumentError: (a ValueError) if those of a method are no mapping.
    """
    for method, given in settings.items():
        if not isinstance(given, Mapping):
            raise InvalidArgumentError(
                f"settings must be a mapping for each method, got {given!r:.60} for {method!r}; write "
                '{"saf": {"coefficient": [0.3, 0.8]}}'
            )
    return {
        method: {name: value if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
        for method, given in settings.items()
    }
