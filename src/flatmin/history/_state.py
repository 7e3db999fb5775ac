"""How a history describes itself in its state, so that no other history loads it, and whose rows the state has."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError

PART = "part"  # the key of (rank, ranks) in a state that has what that rank keeps; without it a state is whole
_thread = threading.local()


@contextmanager
def of_this_rank() -> Iterator[None]:
    """Inside, a ``state_dict`` has what this rank keeps, and is taken without talking to the others."""
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = False


def is_of_this_rank() -> bool:
    """Whether `of_this_rank` is under way."""
    return getattr(_thread, "alone", False)


def described(description: Mapping[str, Any]) -> Tensor:
    """The bytes of a description's JSON, as a tensor, which any format can store."""
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def check_described(ours: Mapping[str, Any], state: Any) -> None:
    """Compares a description with what `described` made of another.

    Args:
        ours: Description of the history that is to load a state.
        state: Description from the state; None if it has none, about which torch itself complains.

    Raises:
        InvalidArgumentError: If they differ; the message says in what.
    """
    if state is None:
        return
    try:
        theirs = dict(json.loads(bytes(state.tolist())))
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(f"the state's _extra_state does not describe a history: {error}") from error
    if "codec" not in theirs:
        raise InvalidArgumentError(
            "the state's history was saved by an earlier version of flatmin, whose layout was another; nothing was "
            "loaded, begin with an empty history or go on with that version"
        )
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        values = [", ".join(f"{name}={each.get(name)}" for name in names) for each in (theirs, ours)]
        grown = "; has the data set grown or shrunk?" if "num_samples" in names else ""
        raise InvalidArgumentError(
            f"the state is of a history with {values[0]} and this one has {values[1]}{grown}; nothing was loaded, "
            "make SAF as it was when the state was saved"
        )
