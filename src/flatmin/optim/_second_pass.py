"""What stands still in the second pass: buffers, and gradients of other ranks in the first.

That both passes draw the same random numbers is `flatmin._rng.replayed`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from .._distributed import initialized
from ._surroundings import Buffers, Surroundings


@contextmanager
def frozen_buffers(surroundings: Surroundings, parameters: list[Tensor]) -> Iterator[None]:
    """Undoes, on leaving, what forward passes inside do to buffers.

    They are copied and put back: setting the momentum to 0, as is often done, still counts batches, and turns an
    infinite activation into NaN for good. The pass itself normalises as it always does.

    Args:
        surroundings: Knows the network, all of whose buffers are meant; or without one its normalisation layers. Those
            that it has not found are found by a hook as they are called; those of a compiled model when it is called
            itself, of which torch warns.
        parameters: The optimizer's.
    """
    buffers = Buffers(surroundings.modules(parameters))

    def save(module: nn.Module) -> None:
        buffers.add(surroundings.seen(module))

    try:
        with nullcontext() if surroundings.model is not None else each_module(save):
            yield
    finally:
        buffers.restore()


@contextmanager
def local_gradients(model: nn.Module | None, *, wanted: bool) -> Iterator[list[ProcessGroup]]:
    """Lets each rank keep the gradient of its own batch in the first pass: ``no_sync`` for a model that is not known.

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


def agreed(number: Tensor, groups: list[ProcessGroup]) -> Tensor:
    """The number, or infinity on all ranks of ``groups`` where it is not finite on one of them."""
    if groups:
        bad = (~number.isfinite()).float()
        for group in groups:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX, group)
        number = torch.where(bad > 0, torch.inf, number)
    return number


@contextmanager
def each_module(visit: Callable[[nn.Module], None], model: nn.Module | None = None) -> Iterator[None]:
    """Calls ``visit`` with the modules of ``model`` at once, or without it with those called inside, before they run.

    Those that another thread calls meanwhile belong to another training.
    The modules of a compiled model, or of one whose ``forward`` is compiled, within which no hook is run, are visited
    when it is called itself; torch warns of the first.
    """
    if model is not None:
        for module in model.modules():
            visit(module)
        yield
        return

    thread = get_ident()

    def hook(module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or get_ident() != thread:  # compiled, it would become a part of the graph
            return
        visit(module)
        if "forward" in module.__dict__ or "_orig_mod" in module._modules:
            for inner in module.modules():
                visit(inner)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
