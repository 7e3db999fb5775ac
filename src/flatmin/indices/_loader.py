"""The data set's own indices for each batch of a DataLoader."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import InvalidArgumentError
from ._collate import Collate
from ._dataset import IndexedDataset, find
from ._indexed import Indexed, split

_WAY_OUT = "make it of flatmin.indexed(dataset), with which the index rides with each sample"


def with_indices(loader: Any) -> "DataLoader[Any]":
    """Goes through a loader, giving with each batch the data set's indices of its samples.

    The batches are those the loader itself would give, drawn by its own sampler, generator and workers. Neither the
    loader nor the data set is changed.

    Args:
        loader: Any ``DataLoader`` over a map-style data set: shuffled, with samplers (``DistributedSampler`` too),
            workers, persistent or not, ``drop_last``. Its class must iterate as ``DataLoader`` does: loaders that
            resume, skip or prefetch are refused. What accelerate's ``prepare`` makes of one is fine, too, but for
            ``dispatch_batches``. Its ``collate_fn`` must keep the order and the number of the samples, see
            `flatmin.indices.collate` for those that sort. **Or any loader**, of any kind, over `flatmin.indexed`: then
            the index that is there is taken off each batch.

    Returns:
        A loader like the given one, whose batches are ``(index, batch)``: ``index`` int64 of shape (B,), on the CPU; of
        shape () where ``batch_size=None`` and the sampler gives one index at a time. It shares the sampler, so
        ``set_epoch`` arrives. Lightning, Fabric and accelerate take it in place of the given one.

    Raises:
        InvalidArgumentError: If ``loader`` is not such a loader; on iteration, if its sampler does not give integers,
            its ``collate_fn`` changes the order of the samples, or a batch over `flatmin.indexed` has no index.

    Example:
        >>> import torch, flatmin
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(4) * 10), batch_size=2)
        >>> for index, (x,) in flatmin.with_indices(loader):
        ...     print(index, x)
        tensor([0, 1]) tensor([ 0, 10])
        tensor([2, 3]) tensor([20, 30])
    """
    if type(loader).__name__ == "PrefetchLoader" and type(loader).__module__.partition(".")[0] == "timm":
        raise InvalidArgumentError(
            "timm's PrefetchLoader hands on (input, target) alone, without indices: make the loader by "
            "create_loader(..., use_prefetcher=False)"
        )
    ridden = find(getattr(loader, "dataset", None))
    if ridden is not None:
        split_off: DataLoader[Any] = _shadow(loader, _splitting(ridden.index_key or ""))
        return split_off
    if not isinstance(loader, DataLoader):
        raise InvalidArgumentError(
            f"loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}; call with_indices on the "
            f"DataLoader itself, before anything wraps it, or {_WAY_OUT}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidArgumentError(
            f"the loader's data set, {type(loader.dataset).__name__}, is iterable and has no indices; let it yield "
            "each sample's own index with the sample and give that to SAF, or use flatmin.MESA, which needs none"
        )
    make: Callable[[Any], DataLoader[Any]] = _prepared if _is_prepared(loader) else _riding
    # Persistent workers belong to the copy that started them, so that copy has to last as long as the loader.
    if not loader.persistent_workers:
        return make(loader)
    if loader not in _persistent:
        _persistent[loader] = make(loader)
    return _persistent[loader]


_persistent: "WeakKeyDictionary[DataLoader[Any], DataLoader[Any]]" = WeakKeyDictionary()


def _riding(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """A copy of a loader, over the same data set with indices.

    Raises:
        InvalidArgumentError: If its batches need not be what its ``collate_fn`` makes.
    """
    for name in ("__iter__", "_get_iterator"):
        if getattr(getattr(loader, name), "__func__", None) is not getattr(DataLoader, name):
            raise InvalidArgumentError(
                f"{type(loader).__name__} has its own {name}, so it may resume, skip, prefetch or change its "
                f"batches; {_WAY_OUT}, or use a plain DataLoader"
            )
    made = copy.copy(loader)
    # DataLoader refuses to have these set; on a copy that nobody has iterated yet it is safe.
    dataset, collate_fn = IndexedDataset(loader.dataset, None), Collate(loader.collate_fn, None)
    made.__dict__.update(dataset=dataset, collate_fn=collate_fn, _iterator=None)
    return made


class _Held:
    """An index that stays on the CPU while a batch is moved to a device."""

    def __init__(self, index: Tensor) -> None:
        self.index = index


def _is_prepared(loader: Any) -> bool:
    """Whether accelerate made the loader. It says that its class is DataLoader, and iterates another one."""
    accelerate = sys.modules.get("accelerate.data_loader")
    adapter = getattr(accelerate, "DataLoaderAdapter", None)  # old versions iterate without it, in __iter__
    if accelerate is None or adapter is None or not issubclass(type(loader), adapter):
        return False
    if type(loader).__iter__ is not accelerate.DataLoaderShard.__iter__:
        raise InvalidArgumentError(
            f"with accelerate's {type(loader).__name__} one process may read for all others, which do not learn the "
            "indices: call with_indices before prepare, accelerator.prepare(with_indices(loader)), or "
            f"{_WAY_OUT}"
        )
    return True


def _prepared(loader: Any) -> Any:
    """The same as `_riding` for what accelerate made of a loader."""
    return _shadow(loader, _release, base_dataloader=_shadow(_riding(loader.base_dataloader), _hold))


def _hold(batches: Iterable[Indexed]) -> Iterator[Indexed]:
    return (Indexed(_Held(index), batch) for index, batch in batches)


def _release(batches: Iterable[Indexed]) -> Iterator[Indexed]:
    return (Indexed(held.index, batch) for held, batch in batches)


@cache
def _splitting(key: str) -> Callable[[Iterable[Any]], Iterator[Indexed]]:
    return lambda batches: (Indexed(*split(batch, key)) for batch in batches)


def _shadow(loader: Any, change: Callable[[Iterable[Any]], Iterator[Any]], **own: Any) -> Any:
    """An object of a loader's class with all its attributes, shared, so that each knows how far the other has come.

    Args:
        loader: Any loader.
        change: Makes other batches of those that it gives.
        **own: Attributes that are not shared.
    """
    kind: Any = type(loader)
    made = object.__new__(_changed(kind, change, tuple(own)))
    made.__dict__ = loader.__dict__
    for name, value in own.items():
        setattr(made, name, value)
    return made


@cache
def _changed(kind: Any, change: Callable[[Iterable[Any]], Iterator[Any]], own: tuple[str, ...]) -> Any:
    """A subclass of a loader's class. Trainers make their own loaders of it, with samplers of theirs."""

    def iterate(self: Any) -> Iterator[Any]:
        return change(kind.__iter__(self))

    def reduce(self: Any) -> tuple[Any, ...]:  # the class has no name by which another process could find it
        given = object.__new__(kind)
        given.__dict__.update(self.__dict__)
        return with_indices, (given,)

    members = {"__slots__": own, "__iter__": iterate, "__reduce__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
