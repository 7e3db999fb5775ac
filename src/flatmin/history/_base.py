"""What every history of past outputs shares: which samples count, lags and running means, state."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number
from ._ranks import occurrences
from ._rows import OUT_OF_RANGE, RANGE
from ._state import check_described, described
from ._store import NEVER, Store


@dataclass
class Batch:
    """A batch as the history sees it; made by `History.open`, used once.

    Attributes:
        index: Sample numbers, int64, shape (B,), where the history is.
        epoch: The epoch.
        first: Which samples come here first, bool, shape (B,): the others contribute nothing.
        kept: Positions whose rows are remembered, one for each place of ``index`` (or, among several ranks, just those
            of this rank that are the global batch's last).
        ranks: The indices of all ranks, on the host, and which of their positions are kept; None on one rank.
        recalled: What was read: rows, uint8, and the epochs they are of.
    """

    index: Tensor
    epoch: int
    first: Tensor
    kept: Tensor
    ranks: list[tuple[Tensor, Tensor]] | None = None
    recalled: tuple[Tensor, Tensor] | None = None


class History(nn.Module, ABC):
    """Remembers what a network said about each sample, ``lag`` epochs back or as a running mean.

    A row of logits becomes ``row_bytes`` bytes; how, is what the subclasses differ in. Each row carries the epoch it
    was written in, so a sample that was skipped is never confused with one recorded in another epoch. A slot is read
    before it is overwritten, so ``lag`` slots are enough (the authors' code has ``lag + 1``).

    The rows themselves are kept, and shared among ranks, by a `Store`. All state is buffers, so that ``state_dict`` and
    ``load_state_dict`` carry it, in its compressed size.

    Where ``torch.distributed`` is initialised, every rank reads what any rank recorded, in two ways: either each rank
    keeps all rows and is told what the others write, or each keeps the rows of its own samples (``index % ranks``) and
    they travel when they are needed. All ranks must then call SAF equally often, and ``state_dict`` together.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        row_bytes: Bytes of a row, as `encode` makes it.
        lag: After how many epochs an output is read again; also the number of slots.
        momentum: In [0, 1). Then there is one slot, with the running mean of a sample's outputs, in place of ``lag``:
            ``mean_e = mean_(e-1) + (1 - momentum) / (1 - momentum^(e+1)) * (logits_e - mean_(e-1))``, temporal
            ensembling (Laine & Aila, ICLR 2017, arXiv 1610.02242); the first output of a sample is its mean.
        path: A folder for a scratch file, if the rows are to be mapped from a disk: it must have room for all of them.
            The file has no name, and is gone when the process ends, however it ends; ``state_dict`` carries the rows.
        location: "device": where ``.to()`` moves it. "host": in main memory, and rows travel without waiting.
        sharing: "replicate" | "shard" | "auto" (by size): how ranks share rows.

    Raises:
        InvalidArgumentError: If an argument is out of its bounds, or the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        row_bytes: int,
        lag: int = 3,
        momentum: float | None = None,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
    ) -> None:
        super().__init__()
        self.num_samples = check_integer("num_samples", num_samples, least=1)
        self.num_classes = check_integer("num_classes", num_classes, least=2)
        self.momentum = None if momentum is None else check_number("momentum", momentum, least=0, below=1)
        self.lag = check_integer("lag", lag, least=1) if momentum is None else 1
        self.row_bytes = row_bytes
        self.store = Store(self.lag, self.num_samples, row_bytes, path=path, location=location, sharing=sharing)

    @abstractmethod
    def encode(self, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Turns outputs into rows.

        Args:
            logits: Detached outputs, shape (B, C).
            epoch: The current epoch.

        Returns:
            The rows, uint8, shape (B, row_bytes), and a bool mask, shape (B,), of those worth keeping: finite ones.
        """

    @abstractmethod
    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """Turns rows into outputs again, up to a constant for each sample.

        Args:
            rows: As `encode` made them, uint8, shape (B, row_bytes).
            epoch: The epoch in which they were made.
            logits: The present outputs of the same samples, shape (B, C): what rows leave out is taken from there.

        Returns:
            The past outputs, shape (B, C), finite everywhere.
        """

    @abstractmethod
    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Gives the present and the past outputs over the same outcomes, for the trajectory loss.

        Args:
            logits: The present outputs, shape (B, C).
            rows: The past ones, uint8, shape (B, row_bytes).
            epoch: The epoch in which they were made.

        Returns:
            Two tensors of shape (B, M): M is C, or fewer where classes are taken together.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What another history must have in common with this one to take over its state: plain values."""

    def _shape(self) -> dict[str, Any]:
        """What `describe` says of every kind."""
        names = ("num_samples", "num_classes", "lag", "momentum")
        return {"form": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def open(self, index: Tensor, epoch: int) -> Batch:
        """Begins a batch: what is still under way arrives, and all ranks learn which samples are in it.

        A batch is read as if its samples had come one after another, rank after rank.

        Args:
            index: This rank's sample numbers, int64, shape (B,).
            epoch: The current epoch, from 0.

        Returns:
            What `recall` and `record` take, once each at most and in this order.

        Raises:
            InvalidArgumentError: If the ranks are not those the history was made for, or are in different epochs.
        """
        everyone = self.store.meet(index, epoch)
        if everyone is None:
            # From an accelerator to the host it has to be waited for.
            index = index.to(self.device, torch.int64, non_blocking=self.device.type != "cpu")
            first, last = occurrences(index)
            return Batch(
                index, epoch, first == torch.arange(len(index), device=index.device), self._choose(first, last)
            )
        first, last = occurrences(torch.cat(everyone))
        places = torch.arange(len(first), device=first.device)
        sizes = [len(each) for each in everyone]
        kept = [mask.nonzero().flatten() for mask in torch.split(self._choose(first, last) == places, sizes)]
        mine = torch.split(first == places, sizes)[self.store.ranks.rank]
        rank = self.store.ranks.rank
        return Batch(everyone[rank], epoch, mine, kept[rank], list(zip(everyone, kept, strict=True)))

    def recall(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reads what is remembered of a batch.

        Args:
            batch: From `open`, before `record`.
            logits: The present outputs, shape (B, C).

        Returns:
            The present and the past outputs, as `compare` gives them, and a bool mask, shape (B,), of the samples
            that count: those with a past, each at the first place it comes.
        """
        rows, epochs = self._read(batch, logits.device)
        then = batch.epoch - self.lag
        there = (epochs != NEVER) & ((epochs == then) if self.momentum is None else (epochs != batch.epoch))
        now, past = self.compare(logits, rows, then)
        return now, past, there & batch.first.to(logits.device, non_blocking=True)

    @torch.no_grad()
    def record(self, batch: Batch, logits: Tensor) -> None:
        """Remembers a batch, over what the slot held before.

        A row that is not finite is recorded as missing; in a mean it is left out.

        Args:
            batch: From `open`.
            logits: The present outputs, shape (B, C).
        """
        logits = logits.detach()
        rows = epochs = None
        if self.momentum is not None:
            rows, epochs = self._read(batch, logits.device)
            mean = self.decode(rows, batch.epoch, logits)
            mean = mean.masked_fill(mean == -OUT_OF_RANGE, -RANGE)  # or it would stay there for good
            share = (1 - self.momentum) / (1 - self.momentum ** (batch.epoch + 1))
            logits = torch.where((epochs == NEVER)[:, None], logits, mean + share * (logits - mean))
        fresh, whole = self.encode(logits, batch.epoch)
        tags = torch.where(whole, batch.epoch, NEVER).to(torch.int32)
        if rows is not None and epochs is not None:  # twice in an epoch, or not finite: the mean stays
            whole = whole & (epochs != batch.epoch)
            fresh, tags = torch.where(whole[:, None], fresh, rows), torch.where(whole, tags, epochs)
        kept = batch.kept.to(fresh.device, non_blocking=True)
        chosen = None if batch.ranks is None else [index[positions] for index, positions in batch.ranks]
        self.store.write(batch.index, batch.epoch % self.lag, fresh[kept], tags[kept], chosen)

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank, by all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.store.rows.device

    @property
    def devices(self) -> set[torch.device]:
        """Where everything is that ``.to()`` moves: not the rows that stay in main memory or on a disk."""
        moved = {buffer.device for buffer in self.buffers(recurse=False)}
        return moved if self.store.on_host else moved | {self.device}

    def extra_repr(self) -> str:
        """Shows what it keeps when printed."""
        return ", ".join(f"{name}={value}" for name, value in self.describe().items()) + f", nbytes={self.nbytes}"

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises `InvalidArgumentError` if ``state`` is of another kind of history than this one.

        Args:
            state: A ``state_dict``.
            prefix: What its names of this history begin with, such as ``"history."``.
        """
        check_described(self.describe(), state.get(f"{prefix}_extra_state"))

    def get_extra_state(self) -> Tensor:
        """Carries `describe` in ``state_dict``: the bytes of its JSON as a tensor, which any format can store."""
        return described(self.describe())

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: what is described was compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.check_state(state_dict, prefix)  # before anything is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _choose(self, first: Tensor, last: Tensor) -> Tensor:
        """Of a sample that comes twice, the last output is remembered, and the first goes into a mean."""
        return last if self.momentum is None else first

    def _read(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a batch and the epochs they are of, on ``device``; read once."""
        if batch.recalled is None:
            everyone = None if batch.ranks is None else [index for index, _ in batch.ranks]
            batch.recalled = self.store.read(batch.index, batch.epoch % self.lag, device, everyone)
        return batch.recalled
