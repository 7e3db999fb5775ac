"""What a step at perturbed weights needs to know of DistributedDataParallel."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from .._distributed import initialized
from ._modules import each_module


@contextmanager
def local_gradients(model: nn.Module | None, *, wanted: bool) -> Iterator[list[ProcessGroup]]:
    """Lets each replica keep the gradient of its own batch: what ``no_sync`` does, for a model that is not known.

    Args:
        model: The network. If none of its modules is a ``DistributedDataParallel``, they are found by a hook as they
            are called.
        wanted: If False nothing is done and nothing found.

    Yields:
        The process groups of those that were found, complete on leaving.
    """
    groups: list[ProcessGroup] = []
    if not (wanted and initialized()):
        yield groups
        return
    stopped: list[DistributedDataParallel] = []

    def stop(module: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            if module.process_group not in groups:
                groups.append(module.process_group)
            # torch cannot leave out the very first synchronisation of a static graph
            first = module.static_graph and not module._static_graph_delay_allreduce_enqueued
            if module.require_backward_grad_sync and not first:  # inside a no_sync of the user's it is off already
                module.require_backward_grad_sync = False
                stopped.append(module)

    known = model is not None and any(isinstance(module, DistributedDataParallel) for module in model.modules())
    try:
        with each_module(stop, model if known else None):
            yield groups
    finally:
        for module in stopped:
            module.require_backward_grad_sync = True


def agreed(number: Tensor, groups: list[ProcessGroup]) -> float:
    """The number as a float, or infinity on all ranks of ``groups`` where it is not finite on one of them."""
    if groups:
        bad = (~number.isfinite()).float()
        for group in groups:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX, group)
        number = torch.where(bad > 0, torch.inf, number)
    return float(number)
