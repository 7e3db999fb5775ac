"""A history: the logits of every sample, some epochs back or as a running mean."""

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import Loaded, check_flag, check_integer, check_mapping, check_number, check_path, check_tensor, shown
from ..errors import InvalidArgumentError
from ._codec import Codec
from ._ranks import occurrences
from ._rows import OUT_OF_RANGE, RANGE
from ._state import NEVER, check_described, described, lengthened
from ._store import Store, move

LAG = 3


@dataclass
class _Batch:
    """A batch as the history sees it.

    Attributes:
        index: Sample indices, int64, shape (B,), on the history's device.
        epoch: The current epoch.
        first: Bool, shape (B,): whether this is the first occurrence of its sample. Only first ones contribute.
        kept: Positions of the rows to remember, one for each entry of ``index``. On several ranks: of the rows of this
            rank that are the last of their sample in the global batch.
        ranks: For each rank its indices, on the host, and which of their positions are kept; None on one rank.
        read: What the store had: rows, uint8, shape (B, row_bytes), and their epochs, int32, shape (B,).
    """

    index: Tensor
    epoch: int
    first: Tensor
    kept: Tensor
    ranks: list[tuple[Tensor, Tensor]] | None = None
    read: tuple[Tensor, Tensor] | None = None


class History(Loaded):
    """Remembers the logits of every sample, from ``lag`` epochs earlier or as a running mean.

    `flatmin.SAF` makes one; you rarely do. A codec turns each row of logits into bytes. The history decides when a row
    is read and written, a `Store` where it is kept and how ranks share it. Each row carries the epoch it was written
    in, so a sample that an epoch skipped is never confused with one recorded in another epoch. Rows are read before
    they are overwritten, so ``lag`` slots are enough (the authors' code has ``lag + 1``).

    All state is in buffers: ``state_dict`` carries it in its compressed size.

    If ``torch.distributed`` is initialised, every rank reads what any rank recorded. All ranks must call `exchange`
    equally often, and take ``state_dict`` together.

    Args:
        codec: How a row is kept: ``Dense()``, ``Quantized(bits)``, ``LowRank(rank)``, ``TopK(k)``, or a `Codec` of
            your own. The history uses a copy of it.
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        lag: Compare each row with the one from ``lag`` epochs earlier; at least 1. None: 3, or a running mean.
        momentum: In [0, 1). Keep one slot, with a running mean of each sample's logits, instead of ``lag`` slots:
            ``mean_e = mean_(e-1) + (1 - momentum) / (1 - momentum^(e+1)) * (logits_e - mean_(e-1))``. This is temporal
            ensembling (Laine & Aila, ICLR 2017, arXiv 1610.02242); a sample's first logits are its first mean.
        temperature: Temperature of the loss that the rows are for, > 0; `TopK` depends on it.
        path: A folder for a scratch file from which the rows are memory-mapped. It must have room for all of them. The
            file has no name and is gone when the process ends, however it ends; ``state_dict`` carries the rows.
        location: "device": the rows are where ``.to()`` moves the history. "host": they stay in main memory, and
            travel to the GPU and back without blocking either.
        sharing: "replicate": each rank keeps all rows. "shard": each rank keeps the rows of its own samples, those
            with ``index % ranks == rank``, and sends them when needed. "auto": shard above 1 GiB.
        grown: Whether a state of fewer samples may be loaded: those that it has are the first ones of this data set,
            and the others begin empty. False: it is refused.

    Attributes:
        codec: The bound copy of the codec.
        store: Where the rows are.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, the codec does not fit the sizes, or
            the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> import torch
        >>> from flatmin.history import Dense, History
        >>> history = History(Dense(), num_samples=4, num_classes=2, lag=1)
        >>> history.exchange(torch.tensor([2]), torch.tensor([[1.0, -1.0]]), epoch=0, compare=False)
        >>> now, past, mask = history.exchange(torch.tensor([2, 3]), torch.zeros(2, 2), epoch=1)
        >>> past[0], mask
        (tensor([ 1., -1.]), tensor([ True, False]))
        >>> history.nbytes
        48
    """

    def __init__(
        self,
        codec: Codec,
        num_samples: int,
        num_classes: int,
        *,
        lag: int | None = None,
        momentum: float | None = None,
        temperature: float = 5.0,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
        grown: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(codec, Codec):
            raise InvalidArgumentError(f"codec must be one of flatmin.history, such as Dense(), got {shown(codec)}")
        self.num_samples, self.num_classes, self.lag, self.momentum = check_sizes(
            num_samples, num_classes, lag, momentum
        )
        self._described = (copy.deepcopy(codec), check_number("temperature", temperature, above=0))
        self.codec = self._bound()
        self.grown = grown
        folder = check_path("path", path)
        self.store = Store(self.lag, self.num_samples, self.row_bytes, path=folder, location=location, sharing=sharing)

    def exchange(
        self, index: Tensor, logits: Tensor, epoch: int, *, compare: bool = True, decode: bool = True
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Reads the past logits of a batch, and records the current ones in their place.

        The samples of a batch count one after another, those of several ranks in the order of the ranks. If a sample
        occurs twice, its first occurrence is compared and its last is recorded. A row that is not finite is recorded
        as missing; a running mean skips it.

        Args:
            index: This rank's sample indices, int64, shape (B,).
            logits: The current logits, floating, shape (B, C). They are recorded detached.
            epoch: The current epoch, from 0.
            compare: Whether to read; False only records.
            decode: False returns the current logits as they are, and the past rows as bytes, for `Codec.compare`.

        Returns:
            None without ``compare``. Otherwise the current logits, through which gradients flow, and the past ones,
            both of shape (B, M) where M is C or what the codec makes of it, and a bool mask, shape (B,), of the
            samples to compare: the first occurrence of each sample that has a past.

        Raises:
            InvalidArgumentError: If an argument does not fit, or the ranks are not those the history was made for, or
                are in different epochs.
        """
        self._check(index, logits, epoch)
        return self._exchange(index, logits, epoch, compare=check_flag("compare", compare), decode=decode)

    def _exchange(
        self, index: Tensor, logits: Tensor, epoch: int, *, compare: bool, decode: bool = True
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same for arguments that were checked."""
        batch = self._begin(index, epoch)
        compared = self._compare(batch, logits, decode) if compare else None
        self._record(batch, logits)
        return compared

    def recall(self, index: Tensor, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reads the past logits of a batch and records nothing; see `exchange` for arguments, results and errors."""
        self._check(index, logits, epoch)
        return self._compare(self._begin(index, epoch), logits)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without its epoch."""
        return self.codec.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers on this rank."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.store.rows.device

    @property
    def devices(self) -> set[torch.device]:
        """Where everything is that ``.to()`` moves: not the rows that stay in main memory or in a file."""
        moved = {buffer.device for buffer in self.codec.buffers()}
        return moved if self.store.on_host else moved | {self.device}

    def describe(self) -> dict[str, Any]:
        """Returns what another history must share with this one to load its state, as plain values by name."""
        names = ("num_samples", "num_classes", "lag", "momentum")
        return {
            "codec": type(self.codec).__name__,
            **{name: getattr(self, name) for name in names},
            **self.codec.describe(),
        }

    def extra_repr(self) -> str:
        """Shows sizes and bytes when printed."""
        names = ("num_samples", "num_classes", "lag", "momentum", "nbytes")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises `StateDictError` if ``state`` is that of a history other than this one.

        Args:
            state: A ``state_dict``.
            prefix: The prefix of this history's keys in it, such as ``"history."``.
        """
        check_mapping("state", state)
        if not isinstance(prefix, str):
            raise InvalidArgumentError(f"prefix must be a text, got {shown(prefix)}")
        self._fewer(state, prefix)

    def get_extra_state(self) -> Tensor:
        """Puts `describe` into ``state_dict``: the bytes of its JSON as a tensor, which any format can store."""
        return described(self.describe())

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the description was compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
        if (before := self._fewer(state_dict, prefix)) is not None:  # in torch's own copy, of which the store reads
            state_dict.update(lengthened(state_dict, f"{prefix}store.", before, self.num_samples))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _forget(self) -> None:
        """Begins anew, as if nothing had been recorded: for another training."""
        self.store.forget()
        place = next((buffer.device for buffer in self.codec.buffers()), None)
        self.codec = self._bound() if place is None else self._bound().to(place)

    def _bound(self) -> Codec:
        """A codec as it was given, made for this history, which has seen nothing."""
        codec, temperature = self._described
        return codec.bind(self.num_classes, lag=self.lag, temperature=temperature, momentum=self.momentum)

    def _fewer(self, state: Mapping[str, Any], prefix: str) -> int | None:
        """The number of samples in a state that has fewer, which may be loaded."""
        return check_described(self.describe(), state.get(f"{prefix}_extra_state"), grown=self.grown)

    def _check(self, index: Tensor, logits: Tensor, epoch: int) -> None:
        """Checks the arguments of `exchange`."""
        check_integer("epoch", epoch, least=0)
        shape = check_tensor("logits", logits).shape
        if len(shape) != 2 or shape[1] != self.num_classes:
            raise InvalidArgumentError(f"logits must be of shape (batch, {self.num_classes}), got {shown(logits)}")
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.shape != shape[:1]:
            raise InvalidArgumentError(
                f"index must be int64 and of shape ({shape[0]},), one sample index for each row of logits, got "
                f"{shown(index)}"
            )
        if (
            index.device.type == "cpu"
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) < self.num_samples
        ):
            raise InvalidArgumentError(
                f"index must lie in [0, {self.num_samples}), got values from {int(index.min())} to {int(index.max())}"
            )

    def _begin(self, index: Tensor, epoch: int) -> _Batch:
        """Lets what is under way arrive, tells all ranks which samples the batch has, and readies the codec."""
        everyone = self.store.meet(index, epoch)
        self.codec.begin_epoch(epoch)
        if everyone is None:
            # Copying from an accelerator to the host has to wait.
            index = index.to(torch.int64)
            index = index.to(self.device) if self.device.type == "cpu" else move(index, self.device)
            first, last = occurrences(index)
            is_first = first == torch.arange(len(index), device=index.device)
            return _Batch(index, epoch, is_first, self._choose(first, last))
        first, last = occurrences(torch.cat(everyone))
        positions = torch.arange(len(first), device=first.device)
        sizes = [len(each) for each in everyone]
        kept = [mask.nonzero().flatten() for mask in torch.split(self._choose(first, last) == positions, sizes)]
        rank = self.store.ranks.rank
        mine = torch.split(first == positions, sizes)[rank]
        return _Batch(everyone[rank], epoch, mine, kept[rank], list(zip(everyone, kept, strict=True)))

    def _compare(self, batch: _Batch, logits: Tensor, decode: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        rows, epochs = self._read(batch, logits.device)
        then = batch.epoch - self.lag
        there = (epochs != NEVER) & ((epochs == then) if self.momentum is None else (epochs != batch.epoch))
        now, past = self.codec.compare(logits, rows, then) if decode else (logits, rows)
        return now, past, there & batch.first.to(logits.device, non_blocking=True)

    @torch.no_grad()
    def _record(self, batch: _Batch, logits: Tensor) -> None:
        logits = logits.detach()
        rows = epochs = None
        if self.momentum is not None:
            rows, epochs = self._read(batch, logits.device)
            mean = self.codec.decode(rows, batch.epoch, logits)
            mean = mean.masked_fill(mean == -OUT_OF_RANGE, -RANGE)  # or it would stay there for good
            share = (1 - self.momentum) / (1 - self.momentum ** (batch.epoch + 1))
            logits = torch.where((epochs == NEVER)[:, None], logits, mean + share * (logits - mean))
        fresh, good = self.codec.encode(logits)
        tags = torch.where(good, batch.epoch, NEVER).to(torch.int32)
        if rows is not None and epochs is not None:  # twice in an epoch, or not finite: the mean stays
            good = good & (epochs != batch.epoch)
            fresh, tags = torch.where(good[:, None], fresh, rows), torch.where(good, tags, epochs)
        kept = batch.kept.to(fresh.device, non_blocking=True)
        chosen = None if batch.ranks is None else [index[positions] for index, positions in batch.ranks]
        self.store.write(batch.index, batch.epoch % self.lag, fresh[kept], tags[kept], chosen)

    def _choose(self, first: Tensor, last: Tensor) -> Tensor:
        """Of a sample that occurs twice, the last row is remembered, or the first goes into its mean."""
        return last if self.momentum is None else first

    def _read(self, batch: _Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a batch and their epochs, on ``device``; read once."""
        if batch.read is None:
            everyone = None if batch.ranks is None else [index for index, _ in batch.ranks]
            batch.read = self.store.read(batch.index, batch.epoch % self.lag, device, everyone)
        return batch.read


def check_sizes(
    num_samples: int, num_classes: int, lag: int | None, momentum: float | None
) -> tuple[int, int, int, float | None]:
    """Returns the arguments of a `History` that its size depends on, checked; the lag is 1 with a running mean."""
    num_samples = check_integer("num_samples", num_samples, least=1)
    num_classes = check_integer("num_classes", num_classes, least=2)
    lag = None if lag is None else check_integer("lag", lag, least=1)
    if momentum is None:
        return num_samples, num_classes, LAG if lag is None else lag, None
    momentum = check_number("momentum", momentum, least=0, below=1)
    if lag is not None:
        raise InvalidArgumentError(
            f"lag={lag} and momentum={momentum} exclude each other: a running mean covers all epochs; leave one out"
        )
    return num_samples, num_classes, 1, momentum
