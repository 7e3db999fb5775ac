"""Keeps the statistics of normalisation layers still during a pass at perturbed weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook


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

    def save(module: nn.Module, *_: Any) -> None:
        if isinstance(module, _NormBase) and module.training and module not in saved:
            saved[module] = [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
        elif isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):  # within it no hook is run
            for inner in compiled.modules():
                save(inner)

    release: Callable[[], None] | None = None
    if model is None:
        release = register_module_forward_pre_hook(save).remove
    else:
        for module in model.modules():
            save(module)
    try:
        yield
    finally:
        if release is not None:
            release()
        with torch.no_grad():
            for pairs in saved.values():
                for buffer, copy in pairs:
                    buffer.copy_(copy)
