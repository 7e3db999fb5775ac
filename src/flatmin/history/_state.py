"""How a history describes itself in its state, so that no other history loads it, and whose rows the state has."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import StateDictError

NEVER = -1  # the epoch of an empty row
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


def check_described(ours: Mapping[str, Any], state: Any, *, grown: bool = False) -> int | None:
    """Compares a description with what `described` made of another.

    Args:
        ours: Description of the history that is to load a state.
        state: Description from the state; None if it has none, about which torch itself complains.
        grown: Whether the state may have fewer samples.

    Returns:
        The number of samples in the state, if it has fewer.

    Raises:
        StateDictError: If they differ; the message says in what.
    """
    if state is None:
        return None
    try:
        theirs = dict(json.loads(bytes(state.tolist())))
    except (ValueError, AttributeError, TypeError) as error:
        raise StateDictError(f"the state's _extra_state does not describe a history: {error}") from error
    if "codec" not in theirs:
        raise StateDictError(
            "the state's history was saved by an earlier version of flatmin, whose layout was another; nothing was "
            "loaded, begin with an empty history or go on with that version"
        )
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if not names:
        return None
    fewer = names == ["num_samples"] and theirs["num_samples"] < ours["num_samples"]
    if fewer and grown:
        return int(theirs["num_samples"])
    values = [", ".join(f"{name}={each.get(name)}" for name in names) for each in (theirs, ours)]
    rest = "; has the data set grown or shrunk?" if "num_samples" in names else ""
    way_out = "make SAF as it was when the state was saved"
    if fewer:
        way_out += ", or with grown=True if the new samples come after the old ones"
    raise StateDictError(
        f"the state is of a history with {values[0]} and this one has {values[1]}{rest}; nothing was loaded, {way_out}"
    )


def lengthened(state: Mapping[str, Any], prefix: str, before: int, now: int) -> dict[str, Any]:
    """What of a store's state of ``before`` samples is longer in one of ``now``, of which the last are empty.

    Args:
        state: A ``state_dict``, whole or a rank's part: sample ``i`` is with rank ``i % ranks``, at ``i // ranks``.
        prefix: The prefix of the store's keys in it.
        before: Number of samples in the state.
        now: Number of samples to be.
    """
    rank, ranks = (0, 1) if (part := state.get(prefix + PART)) is None else part.tolist()
    if rank == before:  # an average's, which has none
        return {prefix + PART: torch.tensor([now, now + 1])}
    longer = {}
    for name, empty in (("rows", 0), ("epochs", NEVER)):
        given = state.get(prefix + name)
        if isinstance(given, Tensor):
            made = given.new_full((given.shape[0], len(range(rank, now, ranks)), *given.shape[2:]), empty)
            made[:, : given.shape[1]] = given
            longer[prefix + name] = made
    return longer
