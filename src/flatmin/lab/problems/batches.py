"""Loaders: each epoch's batches, and of each the share of this rank."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from ... import _distributed


class RankBatches(Sampler[list[int]]):
    """Of each batch of a sampler, this rank's share; on one rank the whole.

    All ranks draw the same batches, so that a run on several sees what a run on one does, but for this: a last batch
    that leaves a rank with fewer than ``least`` samples is left out, so that on several an epoch may lack a few
    samples, others in each.

    Args:
        batches: Draws the batches of all ranks together.
        size: How many samples it draws.
        least: See above.

    Attributes:
        lengths: Of the batches, on all ranks together.
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
        """What the mean over this rank's share counts, so that the mean over the ranks is that over the batch."""
        length = self.lengths[step]
        share = _distributed.share(length)
        return float((share.stop - share.start) * _distributed.size() / length)


def make_loader(
    dataset: "Dataset[Any]", batch_size: int, *, workers: int, generator: torch.Generator | None = None
) -> "DataLoader[Any]":
    """Returns a loader: shuffled by ``generator`` if there is one, in order otherwise.

    Args:
        dataset: Map-style.
        batch_size: Samples in a batch, on all ranks together.
        workers: Processes that load.
        generator: Draws the order.
    """
    size = len(dataset)  # type: ignore[arg-type]
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
        # Workers are started anew for each epoch, and seeded by `generator`: what a data set draws in them follows from
        # the epoch alone, and a run that is continued draws the same.
        num_workers=workers,
    )
