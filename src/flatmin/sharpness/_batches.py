"""The batches that are measured on: the same in every pass, and kept where the model is if they are small."""

import copy
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from .. import _rng
from .._checks import SEED, check_integer, shown
from ..errors import InvalidArgumentError

Batch = tuple[Tensor, Any]
Place = tuple[torch.device, torch.dtype, torch.memory_format]  # the last is that of inputs of four dimensions
KEPT = 2**28  # bytes of inputs that are kept where the model is; larger sets are read again in each pass


class Batches:
    """Fixed batches of ``(x, y)``, for one or more objectives.

    Args:
        source: Pairs ``(x, y)``, iterated again whenever they must be read.
        samples: Keep this many samples at most, drawn by ``seed``; None for all.
        seed: What loading draws from is seeded with it before each pass.

    Attributes:
        samples: Number of samples in all batches, once they are placed.
        seed: As given.
        generators: The source's own generators, which reading seeds; the caller restores them.
    """

    def __init__(self, source: Iterable[Any], *, samples: int | None, seed: int) -> None:
        if not isinstance(source, Iterable) or isinstance(source, (Iterator, Tensor)):
            raise InvalidArgumentError(
                f"batches must be something that can be iterated again, such as a list or a DataLoader, got "
                f"{type(source).__name__}; list(...) makes one of a generator"
            )
        self._most = None if samples is None else check_integer("samples", samples, least=1)
        self._source, self.seed = source, int(SEED.check("seed", seed))
        self.generators = _generators(source)
        self.samples = 0
        self._kept: list[Batch] | None = None
        self._place: Place | None = None
        self._images: Batch | None = None
        self._tried = False

    def images(self) -> Batch | None:
        """Up to two samples of the first batch, as the source gives them, if they have four dimensions."""
        if not self._tried:
            x, y = next(self._read())
            self._images = (x[:2].clone(), y[:2]) if x.ndim == 4 else None
            self._tried = True
        return self._images

    def place(self, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
        """Brings the batches to where they are used; they are read only if they are not there yet.

        Args:
            device: The model's.
            dtype: Of floating-point inputs.
            layout: Of inputs of four dimensions.
        """
        place = (device, dtype, layout)
        if self._place == place:
            return
        self._place = self._kept = None
        if self._most is None:
            self._kept, self.samples = self._whole(place)
        else:
            self._kept = self._subset(place, self._most)
            self.samples = sum(len(y) for _, y in self._kept)
        self._place = place

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            InvalidArgumentError: If it had another number of samples than the first.
        """
        if self._kept is not None:
            yield from self._kept
            return
        assert self._place is not None
        count = 0
        for x, y in self._moved(self._place):
            count += len(y)
            yield x, y
        if count != self.samples:
            raise InvalidArgumentError(
                f"batches gave {self.samples} samples in the first pass and {count} in a later one: they must be the "
                "same in every pass; make a new Objective if the data have changed"
            )

    def _read(self) -> Iterator[Batch]:
        """A pass over the source, from the same random numbers."""
        _rng.seed_all(self.seed, accelerators=False)  # what loading draws from
        for generator in self.generators:
            generator.manual_seed(self.seed)
        empty = True
        for batch in self._source:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
                raise InvalidArgumentError(f"batches must be pairs (x, y), x a tensor, got {shown(batch)}")
            x, y = batch
            if not isinstance(y, Sized) or (isinstance(y, Tensor) and y.ndim == 0):
                raise InvalidArgumentError(
                    f"batches must be pairs (x, y), y of an entry for each sample, got {shown(y)}"
                )
            if len(y) > 0:
                empty = False
                yield x, y
        if empty:
            raise InvalidArgumentError(
                "batches are empty, no y has an entry: there is no sample to measure the loss on"
            )

    def _moved(self, place: Place) -> Iterator[Batch]:
        """A pass over the source, each batch brought to its place."""
        device, dtype, layout = place
        for x, y in self._read():
            yield (
                cast(x, device, dtype, layout if x.ndim == 4 else torch.preserve_format),
                y.to(device) if isinstance(y, Tensor) else y,
            )

    def _whole(self, place: Place) -> tuple[list[Batch] | None, int]:
        """All batches, or None if they do not fit in `KEPT` bytes, and the number of samples."""
        kept: list[Batch] | None = []
        size = count = 0
        for x, y in self._moved(place):
            size, count = size + x.nbytes, count + len(y)
            if size > KEPT:
                kept = None
            if kept is not None:  # copies: a loader may use its memory again, and a caller change a batch in place
                kept.append((x.clone(), y.clone() if isinstance(y, Tensor) else copy.deepcopy(y)))
        return kept, count

    def _subset(self, place: Place, samples: int) -> list[Batch]:
        """Draws samples, and cuts them into batches of the first one's size."""
        sizes = [len(y) for _, y in self._read()]
        total = sum(sizes)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:samples].sort().values
        parts, start = [], 0
        for (x, y), size in zip(self._moved(place), sizes, strict=True):
            own = chosen[(chosen >= start) & (chosen < start + size)] - start
            parts.append((x[own.to(x.device)], y[own.to(y.device)]))
            start += size
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return list(zip(torch.split(x, sizes[0]), torch.split(y, sizes[0]), strict=True))


def cast(
    tensor: Tensor, device: torch.device, dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format
) -> Tensor:
    """Moves a tensor; its dtype changes only if it is a floating-point one."""
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, memory_format=layout)


def _generators(source: object) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, each once."""
    batch_sampler = getattr(source, "batch_sampler", None)
    owners = (source, getattr(source, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
