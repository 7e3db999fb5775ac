"""Finds the modules that take part in a pass, without being told the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def each_module(visit: Callable[[nn.Module], None], model: nn.Module | None = None) -> Iterator[None]:
    """Calls ``visit`` with the modules of ``model`` at once, or without it with those called inside, before they run.

    The modules of a compiled model, within which no hook is run, are visited when it is called itself; torch warns of
    that.
    """
    if model is not None:
        for module in model.modules():
            visit(module)
        yield
        return

    def hook(module: nn.Module, *_: Any) -> None:
        visit(module)
        if (compiled := module._modules.get("_orig_mod")) is not None:  # getattr would be slow where there is none
            for inner in compiled.modules():
                visit(inner)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
