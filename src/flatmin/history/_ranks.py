"""How the ranks of one training exchange indices and rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _distributed
from ..errors import InvalidArgumentError


class Ranks:
    """The ranks of ``torch.distributed``'s default group, and what they send to each other.

    Indices are exchanged between the hosts, which know them, so that no rank has to ask an accelerator how much it will
    receive. Rows travel from device to device.
    """

    def __init__(self) -> None:
        self._hosts: dist.ProcessGroup | None = None
        self._room = 0  # indices that fit into a message

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hosts": None}  # a group can neither be copied nor pickled; a copy makes its own

    @property
    def size(self) -> int:
        """Number of ranks; 1 without a process group."""
        return _distributed.size()

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        return _distributed.rank()

    def meet(self, index: Tensor, epoch: int) -> list[Tensor]:
        """Returns every rank's ``index``, int64, on the host. A collective call.

        Raises:
            InvalidArgumentError: If the ranks are in different epochs.
        """
        while True:
            # The first message only carries lengths. Later one is enough, unless a batch is longer than all before.
            message = torch.zeros(2 + self._room, dtype=torch.int64, device="cpu")
            message[:2] = torch.tensor([epoch, len(index)])
            if len(index) <= self._room:
                message[2 : 2 + len(index)] = index
            heard = [torch.empty_like(message) for _ in range(self.size)]
            dist.all_gather(heard, message, group=self._host_group())
            epochs, lengths = ([int(each[column]) for each in heard] for column in (0, 1))
            if len(set(epochs)) > 1:
                raise InvalidArgumentError(
                    f"the ranks are in different epochs, {epochs}: call saf.set_epoch(epoch) on every rank, and SAF "
                    "equally often"
                )
            if max(lengths) <= self._room:
                return [each[2 : 2 + length] for each, length in zip(heard, lengths, strict=True)]
            self._room = max(lengths)

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Callable[[], Tensor]:
        """Begins to send ``rows`` to all ranks.

        Args:
            rows: uint8, shape (lengths[rank], n).
            lengths: How many rows each rank sends.

        Returns:
            A function that waits for the rows of all ranks and returns them, in the order of the ranks.
        """
        sent = rows.new_zeros(max(*lengths, 1), rows.shape[1])
        sent[: len(rows)] = rows
        received = [torch.empty_like(sent) for _ in lengths]
        work = dist.all_gather(received, sent, async_op=True)

        def arrive() -> Tensor:
            work.wait()
            return torch.cat([each[:length] for each, length in zip(received, lengths, strict=True)])

        return arrive

    def travel(self, parcels: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], Tensor]:
        """Begins to send each rank its parcel.

        Args:
            parcels: Rows for each rank, uint8, shape (any, n).
            lengths: How many rows come from each rank.

        Returns:
            A function that waits for what the ranks have sent here and returns it, in the order of the ranks.
        """
        sent = torch.cat(list(parcels))
        received = sent.new_empty(sum(lengths), sent.shape[1])
        shares = list(lengths), [len(each) for each in parcels]
        work: Any = dist.all_to_all_single(received, sent, *shares, async_op=True)  # of None too, torch's types say

        def arrive() -> Tensor:
            work.wait()
            return received

        return arrive

    def assemble(self, part: Tensor, length: int) -> Tensor:
        """Puts what the ranks keep together, on every host: ``part`` is ``whole[:, rank::size]``."""
        whole = torch.empty(part.shape[0], length, *part.shape[2:], dtype=part.dtype, device="cpu")
        for rank in range(self.size):
            shape = whole[:, rank :: self.size].shape
            sent = part.cpu().contiguous() if rank == self.rank else torch.empty(shape, dtype=part.dtype, device="cpu")
            dist.broadcast(sent, rank, group=self._host_group())
            whole[:, rank :: self.size] = sent
        return whole

    def _host_group(self) -> "dist.ProcessGroup | None":
        """The default group if it serves the CPU, or else one of gloo, which all ranks make when they first need it."""
        if self._hosts is None and "gloo" not in dist.get_backend_config():
            made: Any = dist.new_group(backend="gloo")  # of a number too, torch's types say: for ranks outside of it
            self._hosts = made
        return self._hosts


def occurrences(index: Tensor) -> tuple[Tensor, Tensor]:
    """For each position of ``index``, the first and the last position of the same sample."""
    ordered, order = index.sort(stable=True)
    first = order[torch.searchsorted(ordered, index)]
    last = order[torch.searchsorted(ordered, index, right=True) - 1]
    return first, last
