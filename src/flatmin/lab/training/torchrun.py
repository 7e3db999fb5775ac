"""The processes of one run that ``torchrun`` started together; with a single process, nothing here does anything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..._distributed import initialized, size
from ..._distributed import rank as joined_rank
from ...errors import InvalidArgumentError

FAILED = "flatmin/failed"  # the rank that reports the failure, in the store that all ranks share


def launched() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() else 1


def rank() -> int:
    """This rank, from 0, even before the ranks have `joined`."""
    if initialized():
        return joined_rank()
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started into one group, each with its own GPU where GPUs are used.

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
        if processes > gpus:  # every rank finds this, before any waits for the others
            raise InvalidArgumentError(
                f"torchrun started {processes} processes on this machine, which has {gpus} GPUs: "
                "start as many as there are, or give --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif device not in ("auto", "cpu"):
        raise InvalidArgumentError(f"device {device!r} cannot be shared by several processes: give auto, cpu or cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield  # an error here ends the process; leaving the group in order would mean waiting for the others
    dist.barrier()
    dist.destroy_process_group()


def claim_failure() -> bool:
    """Whether this process reports the failure; only the first rank that asks does."""
    if launched() == 1:
        return True
    if not dist.is_initialized():  # it failed before the ranks met, so every rank fails alike
        return rank() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.compare_set(FAILED, "", str(rank())) == str(rank()).encode())
    except Exception:  # the store went with the rank that has failed
        return False


def parallel(model: nn.Module) -> nn.Module:
    """The network as the loop calls it, with gradients averaged over the ranks."""
    return model if size() == 1 else DistributedDataParallel(model)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Lets the first rank run the block before the others, so that it alone repairs what a crash left on disk."""
    if rank() > 0 and size() > 1:
        dist.barrier()
    yield
    if rank() == 0 and size() > 1:
        dist.barrier()
