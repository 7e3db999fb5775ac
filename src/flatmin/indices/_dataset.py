"""A data set whose samples carry their own index."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .._checks import shown
from ..errors import InvalidArgumentError
from ._indexed import KEY, Indexed, as_index, check_key, not_integers, put


def indexed(dataset: Any, *, key: str = KEY) -> "IndexedDataset":
    """Lets the index of each sample ride with the sample.

    Whoever draws the order, loads, distributes, skips or resumes: the index of a batch is that of its samples. Use it
    where `with_indices` cannot be (trainers that make the loader themselves, loaders that resume); the loop stays the
    same, since ``with_indices(loader)`` then takes the index off.

    A sample that is a mapping gets its index at ``key``; any other becomes ``Indexed(index, sample)``. The default
    collate function carries both. Give one of your own as ``flatmin.indices.collate(collate_fn)``.
    `flatmin.indices.split` takes the index off a batch.

    Make it once and of the whole data set: an index is the position in ``dataset``. Subsets of it keep those indices,
    so SAF's ``num_samples`` is ``len(dataset)``. Its other attributes are those of ``dataset``. A data set that gives
    another sample in place of a broken one returns ``Indexed(position, sample)`` itself, which is taken as it is.

    Args:
        dataset: Any map-style data set, with samples of any kind; a Hugging Face ``datasets.Dataset`` too.
        key: Where the index is in samples that are mappings.

    Raises:
        InvalidArgumentError: If ``dataset`` has no indices or has them already; on reading, if its samples have
            ``key`` already or are not read by integers.

    Example:
        >>> import torch, flatmin
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> dataset = flatmin.indexed(TensorDataset(torch.arange(4) * 10))
        >>> dataset[3]
        Indexed(index=3, sample=(tensor(30),))
        >>> for index, (x,) in DataLoader(dataset, batch_size=2):
        ...     print(index, x)
        tensor([0, 1]) tensor([ 0, 10])
        tensor([2, 3]) tensor([20, 30])
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        if isinstance(dataset, DataLoader):
            raise InvalidArgumentError(
                "indexed takes a data set, got a DataLoader: use flatmin.with_indices(loader), or make the loader of "
                "flatmin.indexed(dataset)"
            )
        raise InvalidArgumentError(
            f"the data set, {name}, is iterable and has no indices; use flatmin.MESA, which needs none"
        )
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes)):
        raise InvalidArgumentError(f"dataset must be a map-style data set, which has dataset[i], got {shown(dataset)}")
    if isinstance(dataset, Mapping) and isinstance(next(iter(dataset), None), str):
        raise InvalidArgumentError(
            f"the data set, {name}, is read by names; give one of its parts, such as that of {next(iter(dataset))!r}"
        )
    if find(dataset) is not None:
        raise InvalidArgumentError("the data set carries its indices already; call indexed once")
    return IndexedDataset(dataset, check_key("key", key))


class IndexedDataset(Dataset[Any]):
    """What `indexed` returns.

    Args:
        dataset: A map-style data set.
        index_key: Where the index is in samples that are mappings; None: these become `Indexed` too.

    Attributes:
        dataset: The data set. All attributes but these two are read and set there.
        index_key: As given.

    Raises:
        InvalidArgumentError: If ``dataset`` cannot be read by indices, or ``index_key`` is no name.
    """

    dataset: Any
    index_key: str | None

    def __init__(self, dataset: Any, index_key: str | None) -> None:
        if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__getitems__"):
            raise InvalidArgumentError(f"dataset must be a map-style data set, got {shown(dataset)}")
        self.dataset = dataset
        self.index_key = None if index_key is None else check_key("index_key", index_key)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):  # a column of a Hugging Face data set
            return self.dataset[key]
        return self._join(self._index(key), self.dataset[key])

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        """Reads a batch, as torch's loaders do."""
        keys = keys if isinstance(keys, Sized) else list(keys)
        read = getattr(self.dataset, "__getitems__", None)
        samples = read(keys) if read else [self.dataset[key] for key in keys]
        if not isinstance(samples, list) or len(samples) != len(keys):  # a batch that needs no collating
            return self._join(self._index(keys), samples)
        return [self._join(self._index(key, single=True), each) for key, each in zip(keys, samples, strict=True)]

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def __add__(self, other: Any) -> Any:
        raise InvalidArgumentError("the indices of two data sets would be the same: call indexed on their sum")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("dataset", "index_key"):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def _index(self, key: Any, *, single: bool = False) -> int | Tensor:
        """The positions that ``key`` reads, counted from the beginning; or the only one."""
        if type(key) is int and key >= 0:
            return key
        if isinstance(key, slice):
            return torch.arange(*key.indices(len(self)), device="cpu")
        index = as_index(key)
        if index.ndim and single:
            raise not_integers(key)
        if (index < 0).any():
            index = torch.where(index < 0, index + len(self), index)
        return index.clone() if index.ndim else int(index)

    def _join(self, index: int | Tensor, sample: Any) -> Any:
        if isinstance(sample, Indexed):  # the data set has given another sample, and says which
            index, sample = self._index(sample.index), sample.sample
        if self.index_key is None or not isinstance(sample, Mapping):
            return Indexed(index, sample)
        return put(sample, self.index_key, index)


def find(dataset: Any) -> IndexedDataset | None:
    """The `IndexedDataset` in a data set: itself, or what a ``Subset``, a ``ConcatDataset`` or the like was made of.

    Raises:
        InvalidArgumentError: If two data sets with indices of their own are joined.
    """
    if isinstance(dataset, IndexedDataset):
        return dataset
    held = getattr(dataset, "__dict__", {})
    if "dataset" in held:
        return find(held["dataset"])
    parts: Any = held.get("datasets", ())
    parts = parts if isinstance(parts, (list, tuple)) else ()
    found = [each for each in map(find, parts) if each is not None]
    if found and len(parts) > 1:
        raise InvalidArgumentError(
            f"in a {type(dataset).__name__} of indexed data sets, samples of several have the same index: call indexed "
            "on the whole, flatmin.indexed(ConcatDataset([a, b]))"
        )
    return found[0] if found else None
