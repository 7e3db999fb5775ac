"""A collate function that carries the indices of the samples past another one, which knows nothing of them."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate, default_convert

from .._checks import shown
from ..errors import InvalidArgumentError
from ._indexed import KEY, Indexed, as_index, check_key, put
from ._order import is_moved

_WATCHED = 8  # batches, in each process, in which the order of the collated samples is checked


def collate(collate_fn: Callable[[Any], Any], *, key: str = KEY) -> "Collate":
    """Makes of your ``collate_fn`` one for samples of `flatmin.indexed`.

    Yours sees the samples as they are without an index. Where they are mappings it sees them with their index at
    ``key``; a batch that has ``key`` afterwards is taken as it is. To any other batch the indices are added, in the
    order of the samples; a function that sorts its list of samples in place, or takes some out, is followed.

    A function that makes a sorted copy is refused where that is seen: in the first batches, from labels, other small
    entries or sequences that are only padded. Let it sort the samples of `flatmin.indexed` itself, which have
    ``.index`` and ``.sample``, and return ``Indexed(indices, batch)``.

    Args:
        collate_fn: Any function for ``DataLoader(collate_fn=...)``.
        key: As given to `flatmin.indexed`.

    Returns:
        A function that gives an `Indexed`, or a mapping with the indices at ``key``.

    Example:
        >>> import torch, flatmin
        >>> from torch.utils.data import DataLoader
        >>> dataset = flatmin.indexed(["a", "bc", "d"])
        >>> loader = DataLoader(dataset, batch_size=3, collate_fn=flatmin.indices.collate("-".join))
        >>> next(iter(loader))
        Indexed(index=tensor([0, 1, 2]), sample='a-bc-d')
    """
    if not callable(collate_fn):
        raise InvalidArgumentError(f"collate_fn must be a function of a list of samples, got {shown(collate_fn)}")
    return Collate(collate_fn, check_key("key", key))


class Collate:
    """What `collate` returns; a class, so that it reaches workers that are spawned.

    Args:
        collate_fn: The function that knows nothing of indices.
        key: Where the index is in mappings; None: the batch is always an `Indexed`.
    """

    def __init__(self, collate_fn: Callable[[Any], Any], key: str | None) -> None:
        self.collate_fn = collate_fn
        self.key = key
        self._watched = 0

    def __call__(self, samples: Any) -> Any:
        if not isinstance(samples, list):  # read as a batch, so nothing has to be put together
            index, rest = self._take(samples)
            return self._put(index, self.collate_fn(rest), carried=isinstance(rest, Mapping))
        taken = [self._take(sample) for sample in samples]
        before = [rest for _, rest in taken]
        after = list(before)
        batch = self.collate_fn(after)
        order = _followed(before, after)
        index = torch.tensor([taken[position][0] for position in order], dtype=torch.int64, device="cpu")
        carried = all(isinstance(rest, Mapping) for rest in before)
        if not (carried and self._is_in(batch)):
            self._watch([before[position] for position in order], batch)
        return self._put(index, batch, carried=carried)

    def _take(self, sample: Any) -> tuple[Any, Any]:
        """The index, and what the function sees."""
        if isinstance(sample, Indexed):
            return sample
        if self._is_in(sample):
            return sample[self.key], sample
        raise InvalidArgumentError(
            "flatmin.indices.collate is for samples of flatmin.indexed(dataset), got "
            f"{type(sample).__name__} without an index; transformers' Trainer takes it out, unless it has "
            "remove_unused_columns=False or the mixin flatmin.integrations.transformers.Sharpness"
        )

    def _is_in(self, value: Any) -> bool:
        return self.key is not None and isinstance(value, Mapping) and self.key in value

    def _put(self, index: Any, batch: Any, *, carried: bool) -> Any:
        """The batch with its index, which a batch of mappings may have ``carried`` itself."""
        if self.key is None or not isinstance(batch, Mapping):
            return Indexed(as_index(index), batch)
        return batch if carried and self.key in batch else put(batch, self.key, as_index(index))

    def _watch(self, samples: Sequence[Any], batch: Any) -> None:
        if self._watched >= _WATCHED or self.collate_fn is default_collate or self.collate_fn is default_convert:
            return
        self._watched += 1
        if is_moved(samples, batch):
            raise InvalidArgumentError(
                "the loader's collate_fn sorts, drops or moves samples, so each row would get another sample's index: "
                "keep their order (pack_padded_sequence needs no sorted lengths with enforce_sorted=False), or let it "
                "sort the samples of flatmin.indexed(dataset), which have .index and .sample, and return "
                "flatmin.indices.Indexed(indices, batch)"
            )


def _followed(before: Sequence[Any], after: Sequence[Any]) -> Sequence[int]:
    """Positions in ``before`` of the objects in ``after``: those that were sorted or dropped in place.

    All, in order, if nothing is left or anything else is there: the function has cleared or filled its list.
    """
    places = defaultdict[int, deque[int]](deque)
    for position, sample in enumerate(before):
        places[id(sample)].append(position)
    found = [places[id(sample)].popleft() if places[id(sample)] else -1 for sample in after]
    return found if found and -1 not in found else range(len(before))
