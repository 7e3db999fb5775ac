"""Keeps the statistics of normalisation layers still during a pass at perturbed weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ._modules import each_module


@contextmanager
def frozen_statistics(model: nn.Module | None = None) -> Iterator[None]:
    """Undoes, on leaving, what forward passes inside do to running statistics.

    Covers ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every batch- and instance-norm layer of
    torch and its subclasses. They are copied and put back: setting the momentum to 0, as is often done, still counts
    batches, and turns an infinite activation into NaN for good. The pass itself normalises as it always does.

    Args:
        model: The network. Without it, the layers are found by a hook as they are called; those of a compiled model
            when it is called itself, of which torch warns.
    """
    saved: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def save(module: nn.Module) -> None:
        if isinstance(module, _NormBase) and module.training and module not in saved:
            saved[module] = [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]

    try:
        with each_module(save, model):
            yield
    finally:
        with torch.no_grad():
            for pairs in saved.values():
                for buffer, copy in pairs:
                    buffer.copy_(copy)
