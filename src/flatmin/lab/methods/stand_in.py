"""Checks a method's settings before anything else is done, by putting it together on a network of a few weights."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..._rng import CPU, preserved
from ...errors import InvalidArgumentError
from .card import Card
from .method import Ingredients

STEPS = 10**9  # of an epoch: what is too short for the run's own is found when the run begins


def check_settings(method: Card, settings: Mapping[str, Any], epochs: int, *, own: bool) -> None:
    """Checks the value of each hyperparameter: its bounds, and whether the method can be put together with all.

    Args:
        method: The method.
        settings: A value for each hyperparameter.
        epochs: Length of the run.
        own: Whether the method is flatmin's own; one of a user's may need the user's network to be put together.

    Raises:
        InvalidArgumentError: (a ValueError) if a value cannot be used.
    """
    for name, known in method.hyperparameters.items():
        value = settings[name]
        if known.bounds is not None and (value is not None or name == "smoothing"):
            known.bounds.check(name, value)
        if own and known.kind is str and value is not None and not isinstance(value, str):
            raise InvalidArgumentError(f"{name} must be a text, got {value!r:.80}")
    if own:
        put_together(method, settings, epochs)


def put_together(method: Card, settings: Mapping[str, Any], epochs: int) -> None:
    """Assembles the method on a network of a few weights; nothing is drawn or warned of.

    Raises:
        InvalidArgumentError: (a ValueError) if it refuses a value.
    """
    with warnings.catch_warnings(), preserved(CPU):
        warnings.simplefilter("ignore")  # the run itself warns
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = Ingredients(model, optimizer, num_samples=4, num_classes=10, steps_per_epoch=STEPS, epochs=epochs)
        method.assemble(given, settings)
