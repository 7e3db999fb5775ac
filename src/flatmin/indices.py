"""The data set's own indices for each batch of a DataLoader."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .errors import InvalidArgumentError


def with_indices(loader: "DataLoader[Any]") -> "Indexed":
    """Goes through a loader, giving with each batch the data set's indices of its samples.

    The batches are those the loader itself would give, drawn by its own sampler, generator and workers. Neither the
    loader nor the data set is changed: the stream of indices is noted on its way from the sampler to the workers.

    Args:
        loader: Any ``DataLoader`` over a map-style data set: shuffled, with samplers (``DistributedSampler`` too),
            workers, persistent or not, ``drop_last``.

    Returns:
        An iterable, of the loader's length, of ``(index, batch)``: ``index`` int64 of shape (B,), on the CPU; of
        shape () where ``batch_size=None`` and the sampler gives one index at a time.

    Raises:
        InvalidArgumentError: If ``loader`` is not such a loader; on iteration, if its sampler does not give integers.

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
            "each sample's own number with the sample and give that to SAF, or use flatmin.MESA, which needs none"
        )
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise InvalidArgumentError("the loader must be made with in_order=True, or batches come in another order")
    # Persistent workers belong to the copy that started them, so that copy has to last as long as the loader.
    if not loader.persistent_workers:
        return Indexed(loader)
    return _persistent.setdefault(loader, Indexed(loader))


class Indexed:
    """What `with_indices` returns: an iterable of ``(index, batch)`` that can be gone through again."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        # batch_size=None turns batching off: then the sampler, and not the batch sampler, feeds the workers.
        attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._noted = _Noted(getattr(loader, attribute))
        self._loader = copy.copy(loader)
        # DataLoader refuses to have these set; on a copy that nobody has iterated yet it is safe.
        self._loader.__dict__.update({attribute: self._noted, "_iterator": None})

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
