"""The data set's own indices for each batch of a DataLoader."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .errors import InvalidArgumentError

_WAY_OUT = "let the data set yield each sample's own index with the sample and give that to SAF"
_SMALL = 64  # numbers in an entry, above which it is not looked for in other rows
_WATCHED = 8  # batches, in each process, in which the order of the collated samples is checked


def with_indices(loader: "DataLoader[Any]") -> "Indexed":
    """Goes through a loader, giving with each batch the data set's indices of its samples.

    The batches are those the loader itself would give, drawn by its own sampler, generator and workers. Neither the
    loader nor the data set is changed: the stream of indices is noted on its way from the sampler to the workers.

    Args:
        loader: Any ``DataLoader`` over a map-style data set: shuffled, with samplers (``DistributedSampler`` too),
            workers, persistent or not, ``drop_last``. Its class must iterate as ``DataLoader`` does:
            loaders that resume, skip or prefetch are refused. Its ``collate_fn`` must keep the order and the number of
            the samples. One that sorts its list of samples in place is refused, and so is one that moves a column of
            labels or other small entries, of at least three values, in the first batches; other changes cannot be
            noticed.

    Returns:
        An iterable, of the loader's length, of ``(index, batch)``: ``index`` int64 of shape (B,), on the CPU; of
        shape () where ``batch_size=None`` and the sampler gives one index at a time.

    Raises:
        InvalidArgumentError: If ``loader`` is not such a loader; on iteration, if its sampler does not give integers,
            its batches are not drawn by its own sampler, or its ``collate_fn`` changes the order of the samples.

    Example:
        >>> import torch, flatmin
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(4) * 10), batch_size=2)
        >>> for index, (x,) in flatmin.with_indices(loader):
        ...     print(index, x)
        tensor([0, 1]) tensor([ 0, 10])
        tensor([2, 3]) tensor([20, 30])
    """
    if not isinstance(loader, DataLoader):
        raise InvalidArgumentError(
            f"loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}; "
            "wrap the DataLoader itself, before anything that wraps it in turn"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidArgumentError(
            f"the loader's data set, {type(loader.dataset).__name__}, is iterable and has no indices; let it yield "
            "each sample's own index with the sample and give that to SAF, or use flatmin.MESA, which needs none"
        )
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        if getattr(type(loader), name) is not getattr(DataLoader, name):
            raise InvalidArgumentError(
                f"{type(loader).__name__} has a {name} of its own, so its batches need not be those that its sampler "
                f"draws next (it may resume, skip or prefetch); use a plain DataLoader, or {_WAY_OUT}"
            )
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise InvalidArgumentError("the loader must be made with in_order=True, or batches come in another order")
    # Persistent workers belong to the copy that started them, so that copy has to last as long as the loader.
    if not loader.persistent_workers:
        return Indexed(loader)
    return _persistent.setdefault(loader, Indexed(loader))


class Indexed:
    """What `with_indices` returns: an iterable of ``(index, batch)`` that can be iterated again."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        # batch_size=None turns batching off: then the sampler, and not the batch sampler, feeds the workers.
        attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._noted = _Noted(getattr(loader, attribute))
        self._loader = copy.copy(loader)
        # DataLoader refuses to have these set; on a copy that nobody has iterated yet it is safe.
        self._loader.__dict__.update({attribute: self._noted, "_iterator": None})
        if loader.batch_sampler is not None and loader.collate_fn is not default_collate:
            self._loader.collate_fn = _InOrder(loader.collate_fn)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        drawn: deque[Tensor] | None = None
        for batch in self._loader:
            if drawn is None:  # only now is it sure that the loader has begun, and with which stream
                drawn = self._noted.drawn
            if self._loader.persistent_workers and drawn is not self._noted.drawn:
                raise InvalidArgumentError(
                    "persistent workers serve one iteration at a time, and another has begun; "
                    "finish one first, or make the loader with persistent_workers=False"
                )
            if not drawn:
                raise InvalidArgumentError(
                    f"a batch came that this loader's sampler, a {type(self._noted.sampler).__name__}, did not draw: "
                    "the loader keeps one iterator for all epochs, or another object draws for it; use a plain "
                    f"DataLoader, or {_WAY_OUT}"
                )
            yield drawn.popleft(), batch


class _Noted:
    """A sampler that keeps what it has given out until it is asked for."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler
        self.drawn: deque[Tensor] = deque()

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # an Iterable; without a length it raises

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()
        return self._note(self.drawn)

    def _note(self, drawn: "deque[Tensor]") -> Iterator[Any]:
        for indices in self.sampler:
            drawn.append(_as_index(indices))
            yield indices


class _InOrder:
    """A ``collate_fn`` that raises where it is seen to have changed the order of the samples.

    Args:
        collate: The loader's own.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self._watched = 0

    def __call__(self, samples: Any) -> Any:
        if not isinstance(samples, list) or len(samples) < 2:
            return self.collate(samples)
        before = list(samples)
        batch = self.collate(samples)
        then, now = list(map(id, before)), list(map(id, samples))
        dropped = now and len(now) != len(then)  # an empty list is one that was freed
        if dropped or (now != then and sorted(now) == sorted(then)):
            raise _reordered()
        if self._watched < _WATCHED:
            self._watched += 1
            if _is_permuted(before, batch):
                raise _reordered()
        return batch


def _reordered() -> InvalidArgumentError:
    return InvalidArgumentError(
        "the loader's collate_fn sorts, drops or moves samples, so each row would get another sample's index: keep "
        f"their order (pack_padded_sequence needs no sorted lengths with enforce_sorted=False), or {_WAY_OUT}"
    )


def _is_permuted(samples: Sequence[Any], batch: Any) -> bool:
    """Whether a column of the samples is in the batch in another order, and none is in its own.

    A column is one entry of every sample, a number or a tensor of one shape, of at least three values: two labels that
    ``collate_fn`` swaps are no other order.
    """
    found = False
    entries = [list(_entries(sample)) for sample in samples]
    if len({len(each) for each in entries}) > 1:
        return False
    rows = [each.detach() for each in _entries(batch) if _is_plain(each) and each.ndim and len(each) == len(samples)]
    for column in zip(*entries, strict=True):
        values = [torch.as_tensor(each) for each in column if isinstance(each, (int, float)) or _is_plain(each)]
        if len(values) < len(samples) or len({each.shape for each in values}) > 1:
            continue
        for row in rows:
            if row.shape[1:] != values[0].shape:
                continue
            stacked = torch.stack([each.detach() for each in values]).to(row)
            small = stacked[0].numel() <= _SMALL
            if small and len({str(each) for each in stacked.tolist()}) < 3:
                continue
            if torch.equal(stacked, row):
                return False
            found = found or (small and sorted(map(str, stacked.tolist())) == sorted(map(str, row.tolist())))
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _entries(value: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        yield value
        return
    for each in value:
        yield from _entries(each)


_persistent: "WeakKeyDictionary[DataLoader[Any], Indexed]" = WeakKeyDictionary()


def _as_index(drawn: Any) -> Tensor:
    try:
        index = torch.as_tensor(drawn)
    except (TypeError, ValueError, RuntimeError):
        index = torch.empty(0)
    if index.is_floating_point() or index.dtype == torch.bool or index.ndim > 1:
        raise InvalidArgumentError(
            f"the loader's sampler must give integer indices, got {drawn!r:.80}; number the samples from 0"
        )
    return index.to(torch.int64, copy=True)
