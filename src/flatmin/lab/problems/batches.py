"""Loaders: the batches of each epoch, and this rank's share of them."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, Subset, TensorDataset

from ... import _distributed


class RankBatches(Sampler[list[int]]):
    """This rank's share of each batch of a sampler; with one rank, the whole batch.

    All ranks draw the same batches, so a run on several ranks sees the samples that a run on one sees. The exception:
    the last batch is dropped if any rank would get fewer than ``least`` samples of it.

    Args:
        batches: Draws the batches of all ranks together.
        size: Number of samples that it draws.
        least: Fewest samples of a batch that a rank may get.

    Attributes:
        lengths: Size of each batch, all ranks together.
    """

    def __init__(self, batches: BatchSampler, size: int, *, least: int) -> None:
        self.batches = batches
        lengths = (min(batches.batch_size, size - start) for start in range(0, size, batches.batch_size))
        self.lengths = [length for length in lengths if length // _distributed.size() >= least]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[list[int]]:
        for length, batch in zip(self.lengths, self.batches, strict=False):
            own = batch[_distributed.share(length)]
            if own:  # in evaluation a rank may have none of the last
                yield own

    def weight(self, step: int) -> float:
        """Weight of the mean over this rank's share, with which the mean over the ranks is that over the batch."""
        length = self.lengths[step]
        share = _distributed.share(length)
        return float((share.stop - share.start) * _distributed.size() / length)


def make_loader(
    dataset: "Dataset[Any]", batch_size: int, *, workers: int, generator: torch.Generator | None = None
) -> "DataLoader[Any]":
    """Returns a loader: shuffled by ``generator`` if there is one, in order otherwise.

    Args:
        dataset: Map-style.
        batch_size: Samples in a batch, all ranks together.
        workers: Processes that load data.
        generator: Draws the order.
    """
    size = size_of(dataset)
    order: Iterable[int] = range(size) if generator is None else RandomSampler(range(size), generator=generator)
    # Batch norm cannot train on a single sample, so a last batch that leaves a rank with one is left out.
    batches = RankBatches(BatchSampler(order, batch_size, drop_last=False), size, least=2 if generator else 0)
    if type(dataset) is TensorDataset:  # and none of its subclasses, which may do something for each sample
        # Tensors are indexed a batch at a time, some fifty times faster than sample by sample.
        return DataLoader(dataset, batch_size=None, sampler=batches)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        generator=generator,
        # Workers are started anew for each epoch and seeded by `generator`: what a data set draws in them follows from
        # the epoch alone, and a continued run draws the same.
        num_workers=workers,
    )


def drawn_batches(dataset: "Dataset[Any]", samples: int, seed: int, batch_size: int) -> Iterator[Any]:
    """Yields batches of at most ``samples`` of a data set's samples, drawn by the seed; the same on all ranks.

    Reading may draw random numbers, as the data set may: see `flatmin._rng.preserved`. It begins with the first batch.
    """
    chosen = torch.randperm(size_of(dataset), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    if type(dataset) is TensorDataset:
        for part in torch.split(chosen, batch_size):
            yield tuple(tensor[part] for tensor in dataset.tensors)
    else:
        yield from DataLoader(Subset(dataset, chosen.tolist()), batch_size=batch_size)


def rank_batches(loader: "DataLoader[Any]") -> RankBatches:
    """The batches of a loader of `make_loader`; one that reads whole batches has them in place of single samples."""
    found = loader.batch_sampler or loader.sampler
    if not isinstance(found, RankBatches):
        raise TypeError(f"the loader is none of make_loader's: {loader!r}")
    return found


def size_of(dataset: "Dataset[Any]") -> int:
    """Number of samples in a map-style data set; torch's base class has no ``__len__``."""
    if not isinstance(dataset, Sized):
        raise TypeError(f"the data set has no __len__: {type(dataset).__name__}")
    return len(dataset)
