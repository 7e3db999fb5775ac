"""Rows of bytes by sample index: on the device, in main memory or in a file, on one rank or spread over several."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ._memory import scratch_file, zeros
from ._ranks import Ranks
from ._state import NEVER, PART, is_of_this_rank

SHARD_ABOVE = 2**30  # bytes; with sharing="auto", each rank keeps only a part of more than that
TAG_BYTES = 4  # a row's epoch, int32


class Store(nn.Module):
    """Keeps, for each sample, ``slots`` rows of bytes, each with the epoch it was written in.

    Rows that come from a GPU or from other ranks are still under way when `write` returns; they arrive before anything
    is read again. No method waits for an accelerator, except where several ranks keep their rows on the host.

    Args:
        slots: Number of rows of each sample.
        num_samples: Number of samples.
        row_bytes: Bytes of a row.
        path: Folder for a scratch file, see `History`.
        location: "device" or "host", see `History`.
        sharing: "replicate", "shard" or "auto", see `History`.
    """

    rows: Tensor
    epochs: Tensor

    def __init__(
        self, slots: int, num_samples: int, row_bytes: int, *, path: str | Path | None, location: str, sharing: str
    ) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.row_bytes = row_bytes
        self.on_host = check_choice("location", location, ("device", "host")) == "host" or path is not None
        self.ranks = Ranks()
        total = slots * num_samples * (row_bytes + TAG_BYTES)
        check_choice("sharing", sharing, ("auto", "replicate", "shard"))
        self.sharded = sharing == "shard" or (sharing == "auto" and total > SHARD_ABOVE and self.ranks.size > 1)
        # Sample i is with rank i % size, at position i // size. Unsharded it is as if there were one rank.
        self.part = (self.ranks.rank, self.ranks.size) if self.sharded else (0, 1)
        self.in_average = False
        shape = (slots, len(range(self.part[0], num_samples, self.part[1])), row_bytes)
        what = f"a history of {num_samples} samples"
        host = "cpu" if self.on_host else None
        rows = zeros(shape, what=what, device=host) if path is None else scratch_file(Path(path), shape)
        self.register_buffer("rows", rows)
        self.register_buffer("epochs", torch.full(shape[:2], NEVER, dtype=torch.int32, device=self.rows.device))
        self._pending: list[Callable[[], None]] = []

    def meet(self, index: Tensor, epoch: int) -> list[Tensor] | None:
        """Lets rows under way arrive, and returns the indices of every rank; None on one rank. A collective call.

        Raises:
            InvalidArgumentError: If the ranks are not those this was made for, or are in different epochs.
        """
        self.flush()
        if self.in_average:
            raise InvalidArgumentError(
                "this SAF was copied into an average of the network, which has no history of its own: call the SAF "
                "that it was copied from"
            )
        if self.sharded and self.part != (self.ranks.rank, self.ranks.size):
            raise InvalidArgumentError(
                f"the history was made for {self.part[1]} ranks and there are {self.ranks.size}: "
                "make it after torch.distributed.init_process_group, which is in setup() or configure_model() of a "
                "LightningModule and not in its __init__"
            )
        return self.ranks.meet(index.to("cpu", torch.int64), epoch) if self.ranks.size > 1 else None

    def read(
        self, index: Tensor, slot: int, device: torch.device, everyone: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Reads rows.

        Args:
            index: Sample indices of this rank, int64, shape (B,).
            slot: Which row of each sample.
            device: The device to read to.
            everyone: What `meet` returned.

        Returns:
            The rows, uint8, shape (B, row_bytes), and their epochs, int32, shape (B,). An empty row is all
            zeros, and its epoch is `NEVER`.
        """
        if everyone is None or not self.sharded:
            rows, epochs = self._load(index, slot)
            return move(rows, device), move(epochs, device)
        me, size = self.part
        wanted = [move(_pack(*self._load(each[each % size == me] // size, slot)), device) for each in everyone]
        owner = index % size
        arrived = self.ranks.travel(wanted, torch.bincount(owner, minlength=size).tolist())()
        packed = torch.empty_like(arrived)
        packed[owner.argsort(stable=True).to(device, non_blocking=True)] = arrived
        return _unpack(packed)

    def write(self, index: Tensor, slot: int, rows: Tensor, epochs: Tensor, everyone: Sequence[Tensor] | None) -> None:
        """Writes rows. If a sample occurs twice, its rows must be equal.

        Args:
            index: Sample indices, int64, shape (B,); on several ranks those in ``everyone`` are used instead.
            slot: Which row of each sample.
            rows: uint8, shape (B, row_bytes).
            epochs: int32, shape (B,).
            everyone: The sample indices that each rank writes, on the host; None on one rank.
        """
        if everyone is None:
            self._keep(index, slot, rows, epochs)
            return
        packed = _pack(rows, epochs)
        if not self.sharded:
            arrive = self.ranks.gather(packed, [len(each) for each in everyone])
            positions = torch.cat(list(everyone))
        else:
            me, size = self.part
            owner = everyone[me] % size
            order = owner.argsort(stable=True).to(packed.device, non_blocking=True)
            parcels = torch.split(packed[order], torch.bincount(owner, minlength=size).tolist())
            mine = [each[each % size == me] // size for each in everyone]
            arrive = self.ranks.travel(parcels, [len(each) for each in mine])
            positions = torch.cat(mine)
        self._pending.append(lambda: self._keep(positions, slot, *_unpack(arrive().to(self.rows.device))))

    def forget(self) -> None:
        """Makes all rows empty."""
        self.flush()
        self.epochs.fill_(NEVER)

    def flush(self) -> None:
        """Waits for rows that are still under way."""
        while self._pending:
            self._pending.pop(0)()

    def _load(self, index: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        index = index.to(self.rows.device, non_blocking=True)
        return self.rows[slot].index_select(0, index), self.epochs[slot].index_select(0, index)

    def _keep(self, index: Tensor, slot: int, rows: Tensor, epochs: Tensor) -> None:
        """Writes rows here; later if they first have to come from an accelerator."""
        device = self.rows.device
        if rows.is_cuda and device.type == "cpu":
            arrive = _fetch(rows, epochs)
            self._pending.append(lambda: self._keep(index, slot, *arrive()))
            return
        index = index.to(device, non_blocking=True)
        self.rows[slot].index_copy_(0, index, rows.to(device))
        self.epochs[slot].index_copy_(0, index, epochs.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Store":
        # Rows that are kept on the host stay there when the module is moved.
        if not self.on_host:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # a copy or a pickle cannot wait for rows that are under way to this one
        state = self.__dict__.copy()
        if _copied_into_an_average():  # which never reads them, and would keep the memory taken
            nobody = (self.num_samples, self.num_samples + 1)
            none = {name: buffer[:, :0].clone() for name, buffer in self._buffers.items() if buffer is not None}
            state.update(in_average=True, part=nobody, _buffers=none)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_average or (self.part[1] > 1 and is_of_this_rank()):
            destination[prefix + PART] = torch.tensor(self.part)
        elif self.part[1] > 1:  # all rows, so that the state can be loaded on any number of ranks
            for name in ("rows", "epochs"):
                destination[prefix + name] = self.ranks.assemble(getattr(self, name), self.num_samples)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        self.flush()
        # Copied into the tensors that are here, a file perhaps, also with assign=True.
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        part = state_dict.get(prefix + PART)
        theirs = (0, 1) if part is None else tuple(part.tolist())
        state_dict = {key: value for key, value in state_dict.items() if key != prefix + PART}
        for name, empty in (("rows", 0), ("epochs", NEVER)):
            if prefix + name in state_dict:
                state_dict[prefix + name] = self._own(state_dict[prefix + name], theirs, empty)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _own(self, given: Tensor, theirs: tuple[int, ...], empty: int) -> Tensor:
        """What a state that has ``theirs`` part of the samples has of those that are kept here; the rest is empty."""
        me, size = self.part
        if theirs == (0, 1):
            return given[:, me::size]
        if theirs == self.part:
            return given
        mine = torch.arange(me, self.num_samples, size, device=given.device)
        there = mine % theirs[1] == theirs[0]
        own = given.new_full((given.shape[0], len(mine), *given.shape[2:]), empty)
        own[:, there] = given[:, mine[there] // theirs[1]]
        if empty == NEVER and not there.all():
            nobody = theirs[0] == self.num_samples
            whose = "an average, which has none" if nobody else f"rank {theirs[0]} of {theirs[1]} alone"
            warnings.warn(
                f"the state has the history of {whose}: {len(mine) - int(there.sum())} of the {len(mine)} samples here "
                "begin anew; to keep all, load on each rank what that rank saved, take saf.state_dict() on all ranks "
                "together, or make SAF with sharing='replicate'",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
        return own


def _copied_into_an_average() -> bool:
    """Whether torch's ``AveragedModel``, Lightning's too, is copying the network that the history is stored on."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__") == "torch.optim.swa_utils":
            return True
        frame = frame.f_back
    return False


def _pack(rows: Tensor, epochs: Tensor) -> Tensor:
    """Puts rows and epochs side by side, as bytes, to be sent."""
    return torch.cat([rows, epochs[:, None].view(torch.uint8)], dim=1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    rows, epochs = packed[:, :-TAG_BYTES], packed[:, -TAG_BYTES:]
    return rows.clone(), epochs.clone(memory_format=torch.contiguous_format).view(torch.int32).flatten()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor; from main memory to a GPU without waiting."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _fetch(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Begins to copy tensors from a GPU to main memory; the function returned waits and returns the copies."""
    copies = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    make_event: Callable[[], torch.cuda.Event] = torch.cuda.Event  # torch leaves it without types
    copied = make_event()
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def arrive() -> tuple[Tensor, ...]:
        copied.synchronize()
        return copies

    return arrive
