"""The arguments that the methods have in common, written down once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from .._checks import nearest
from ..errors import InvalidArgumentError
from ._perturbation import Scaling
from .schedules import When


class OnePass(TypedDict, total=False):
    """What every method takes; `SharpnessAware` says what each is."""

    parameters: Iterable[Tensor] | None
    scaling: Scaling | None
    scaler: GradScaler | None
    max_norm: float | None


class TwoPasses(OnePass, total=False):
    """What every method with a second pass takes."""

    when: When | None
    model: nn.Module | None
    same_randomness: bool


class EachRank(TwoPasses, total=False):
    """What methods take whose first gradient has no use but to perturb, so that each rank may have its own."""

    norm: Literal["rank", "global"]


def check_taken(method: type, given: Mapping[str, Any], taken: type[OnePass]) -> None:
    """Checks that a method takes all that it was given."""
    common: frozenset[str] = vars(taken)["__optional_keys__"]
    for name in given:
        if name not in common:
            own = inspect.signature(method).parameters.values()
            every = [p.name for p in own if p.kind is p.KEYWORD_ONLY] + sorted(common)
            raise InvalidArgumentError(
                f"{method.__name__} takes no {name}{nearest(name, every)}; it takes {', '.join(every)}"
            )


def check_scaler(scaler: GradScaler | None) -> GradScaler:
    """Returns ``scaler``; one that does nothing where it is None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise InvalidArgumentError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    return GradScaler("cpu", enabled=False) if scaler is None else scaler
