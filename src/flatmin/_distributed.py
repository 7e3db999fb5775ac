"""Ranks, wrapped networks and sharded tensors: the one place that asks torch.distributed what there is."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def initialized() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if initialized() else 1


def rank() -> int:
    """This rank, from 0; 0 without a process group."""
    return dist.get_rank() if initialized() else 0


def share(length: int) -> slice:
    """Which of the ``length`` samples of a batch belong to this rank."""
    return slice(length * rank() // size(), length * (rank() + 1) // size())


def total(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over all ranks, in place, and returns it."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value: Any) -> Any:
    """Returns the first rank's value on every rank; a collective call."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """Returns the values of all ranks, in their order, on every rank; a collective call."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(modules: Sequence[nn.Module]) -> None:
    """Overwrites the buffers of ``modules`` with the first rank's: after a step each rank has its own statistics."""
    if size() > 1:
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def broadcast_state(module: nn.Module) -> None:
    """Overwrites the parameters and buffers of ``module`` with the first rank's, as DDP does when it is made."""
    if size() > 1:
        tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
        dist._broadcast_coalesced(dist.distributed_c10d._get_default_group(), tensors, 2**28, 0)


def wrappers_and_network(model: nn.Module) -> list[nn.Module]:
    """The wrappers around a network (DDP, DataParallel, torch.compile), outermost first, then it."""
    layers = [model]
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original  # torch.compile's; naming its class would import the whole compiler
        else:
            return layers
        layers.append(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile's wrapper."""
    return wrappers_and_network(model)[-1]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; a plain tensor is returned as it is."""
    to_local = getattr(tensor, "to_local", None)  # naming DTensor would take half a second of import
    return tensor if to_local is None else to_local()
