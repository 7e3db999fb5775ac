"""A sample or a batch with its index, and how to take the index off again."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import shown
from ..errors import InvalidArgumentError

KEY = "index"
_DRAWN = "the loader's sampler must give integer indices"
_CARRIED = "the batch must carry integer indices, which its collate_fn leaves as they are"


class Indexed(NamedTuple):
    """A sample with its index in the data set, or a batch with those of its samples: ``index, sample = item``.

    ``default_collate`` turns samples of it into a batch of it, and so do trainers that move batches to a device.

    Attributes:
        index: An int; of a batch int64, shape (B,).
        sample: The sample, or the batch, as it is without an index.
    """

    index: Any
    sample: Any


def split(batch: Any, key: str = KEY) -> tuple[Tensor, Any]:
    """Takes the index off a batch of an indexed data set.

    Args:
        batch: An `Indexed`, or a mapping in which the index is at ``key``. It is not changed.
        key: As given to `indexed`.

    Returns:
        ``(index, batch)``: index int64, shape (B,), and the batch as it would be without.

    Raises:
        InvalidArgumentError: If the batch carries no index.

    Example:
        >>> import torch
        >>> from flatmin.indices import split
        >>> split({"x": torch.zeros(2), "index": torch.tensor([5, 3])})
        (tensor([5, 3]), {'x': tensor([0., 0.])})
    """
    if key != "":  # where there are no mappings
        check_key("key", key)
    if isinstance(batch, Indexed):
        return as_index(batch.index, _CARRIED), batch.sample
    if isinstance(batch, Mapping) and key in batch:
        rest: Any = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        return as_index(rest.pop(key), _CARRIED), rest
    raise InvalidArgumentError(
        f"the batch, {_describe(batch)}, carries no index: let the loader's data set be flatmin.indexed(dataset), and "
        "if the loader has a collate_fn of its own, give it flatmin.indices.collate(collate_fn)"
    )


def put(mapping: Mapping[Any, Any], key: str, index: Any) -> Any:
    """A copy of a sample or a batch, of its own kind if that can change, with the index at ``key``.

    Raises:
        InvalidArgumentError: If something is there already.
    """
    if key in mapping:
        raise InvalidArgumentError(
            f"there is {key!r} already in {_describe(mapping)}: give the index another name, "
            "flatmin.indexed(dataset, key=...), and the same to flatmin.indices.collate"
        )
    joined: Any = copy.copy(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)
    joined[key] = index
    return joined


def as_index(drawn: Any, wanted: str = _DRAWN) -> Tensor:
    """What a sampler has drawn, or a batch carries, as int64, on the device where it is; of shape (B,) or ().

    Raises:
        InvalidArgumentError: If these are no integers.
    """
    try:
        index = drawn if isinstance(drawn, Tensor) else torch.as_tensor(drawn, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        index = torch.empty(0)
    if index.is_floating_point() or index.dtype == torch.bool or index.ndim > 1:
        raise not_integers(drawn, wanted)
    return index.to(torch.int64)


def not_integers(drawn: Any, wanted: str = _DRAWN) -> InvalidArgumentError:
    """The error for an index that is none."""
    return InvalidArgumentError(f"{wanted}, got {' '.join(repr(drawn).split()):.80}; number the samples from 0")


def check_key(name: str, key: Any) -> str:
    """Returns ``key`` if it is a name that an index can have in a mapping."""
    if not isinstance(key, str) or not key:
        raise InvalidArgumentError(f"{name} must be a name, got {shown(key)}")
    return key


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} of {', '.join(map(str, batch))}"
    return type(batch).__name__
