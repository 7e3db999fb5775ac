"""A data set as batches on the device: of tensors that live there, if they fit, and else as its loader reads them."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...errors import DataError
from ...indices import with_indices
from ..problems.checked import pair
from ..problems.data._augment import to_device
from ..problems.problem import Problem, class_numbers

HELD = {"cuda"}  # types of devices that hold data sets and take images channels last
MOST = 4 * 2**30  # bytes of them, and at most a quarter of what is free
SMALL, MANY = 16 * 2**10, 2048  # bytes of a sample of which that many are evaluated at a time


@dataclass(eq=False)
class _Held:
    """Inputs and class numbers on a device, and the set that they are of."""

    dataset: "Dataset[Any]"
    x: Tensor
    y: Tensor


_held: "WeakValueDictionary[tuple[int, torch.device], _Held]" = WeakValueDictionary()  # by the set's id


class Feed:
    """Gives the batches of a training or test set.

    Where the whole set is of tensors and fits, it is copied to the device once, with its labels checked once. The
    samples of a batch are the same either way. Feeds of one set share the copy: a comparison times all rows at once.

    Args:
        problem: The problem.
        part: ``TRAIN`` or ``TEST``, of which the set is ``dataset``.
        dataset: The set.
        device: Where batches are wanted.
        held: Whether it may live there.

    Attributes:
        problem: As given.
        device: As given.
        dataset: What the loader is made of: the set, or as many samples without content.
    """

    def __init__(
        self, problem: Problem, part: str, dataset: "Dataset[Any]", device: torch.device, *, held: bool = True
    ) -> None:
        self.problem, self._part, self.device = problem, part, device
        self._held = _on_device(problem, dataset, device) if held and device.type in HELD else None
        self.dataset = dataset if self._held is None else TensorDataset(torch.empty(len(self._held.y), 0))

    def batches(self, loader: "DataLoader[Any]") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields index, on the CPU, inputs and class numbers.

        Raises:
            FlatminError: If the set gives something else.
        """
        for index, batch in self.problem.source.reading(self._part, with_indices(self._pinning(loader))):
            yield index, *(self._read(batch) if self._held is None else self._taken(index, self._held))

    def without_index(self, loader: "DataLoader[Any]") -> Iterator[tuple[Tensor, Tensor]]:
        """The same, inputs and class numbers alone."""
        if self._held is not None:
            yield from ((x, y) for _, x, y in self.batches(loader))
        else:
            yield from map(self._read, self.problem.source.reading(self._part, self._pinning(loader)))

    def _pinning(self, loader: "DataLoader[Any]") -> "DataLoader[Any]":
        """The loader, whose batches are then where a GPU copies them from while the host goes on."""
        if self._held is not None or self.device.type != "cuda":
            return loader
        made = copy.copy(loader)
        made.pin_memory = True
        return made

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = pair(self.problem, self._part, batch)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _taken(self, index: Tensor, held: _Held) -> tuple[Tensor, Tensor]:
        there = to_device(index, self.device)
        return held.x.index_select(0, there), held.y.index_select(0, there)

    def evaluated_at_a_time(self, batch_size: int) -> int:
        """Samples of a batch in evaluation: more of small ones that live on the device, which is idle otherwise."""
        small = self._held is not None and self._held.x[0].nbytes <= SMALL
        return max(batch_size, MANY if small else 512)


def _on_device(problem: Problem, dataset: "Dataset[Any]", device: torch.device) -> _Held | None:
    """Inputs and class numbers, if they are tensors without code for each sample, and fit."""
    if (known := _held.get((id(dataset), device))) is not None:
        return known
    if type(dataset) is not TensorDataset or len(dataset.tensors) != 2:
        return None
    x, y = dataset.tensors
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * MOST
    if x.nbytes + y.nbytes > min(MOST, free // 4):
        return None
    try:
        made = _Held(dataset, x.to(device), class_numbers(y, problem.num_classes).to(device))
    except DataError:  # which the first batch raises, and says where it is from
        return None
    _held[id(dataset), device] = made
    return made
