"""The processes of one run that ``torchrun`` started together; everything here is as nothing where there is but one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InvalidArgumentError

FAILED = "flatmin/failed"  # the rank that says what went wrong, in the store that all ranks share


def launched() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() else 1


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, from 0, also before it has `joined` the others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Makes one group of the processes that torchrun started, each with a GPU of its own where GPUs are used.

    Args:
        device: The recipe's.

    Raises:
        InvalidArgumentError: If there are more processes than GPUs.
    """
    if launched() == 1:
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:  # found by all of them, before any waits for the others
            raise InvalidArgumentError(
                f"torchrun started {processes} processes on this machine, which has {gpus} GPUs: "
                "start as many as there are, or give --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif device not in ("auto", "cpu"):
        raise InvalidArgumentError(f"device {device!r} cannot be shared by several processes: give auto, cpu or cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield  # what is raised here ends the process; to say good-bye to the others would be to wait for them
    dist.barrier()
    dist.destroy_process_group()


def claim_failure() -> bool:
    """Whether this process is the one to say what went wrong: the first of all ranks to ask."""
    if launched() == 1:
        return True
    if not dist.is_initialized():  # found before the ranks met, and so by all of them
        return rank() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.compare_set(FAILED, "", str(rank())) == str(rank()).encode())
    except Exception:  # the store went with the rank that has failed
        return False


def parallel(model: nn.Module) -> nn.Module:
    """The network as the loop calls it: with its gradients averaged over the ranks."""
    return model if size() == 1 else DistributedDataParallel(model)


def share(length: int) -> slice:
    """Which of the ``length`` samples of a batch are this rank's."""
    return slice(length * rank() // size(), length * (rank() + 1) // size())


def total(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value: Any) -> Any:
    """What the first rank has."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """What each rank has."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def equalise(modules: Sequence[nn.Module]) -> None:
    """Gives all ranks the first one's buffers: each has its own batch-norm statistics after a step."""
    if size() > 1:
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Lets the first rank go through, and then the others: what it finds half done on disk, it settles."""
    if rank() > 0 and size() > 1:
        dist.barrier()
    yield
    if rank() == 0 and size() > 1:
        dist.barrier()
