"""Training and evaluation mode of networks whose layers do something when it changes: fold weights, for one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._distributed import unwrapped
from ._layers import modules


def acts(layer: nn.Module) -> bool:
    """Whether ``train()`` or ``eval()`` of a layer is its own, as of LoRA that is merged for evaluation."""
    return type(layer).train is not nn.Module.train or type(layer).eval is not nn.Module.eval


@contextmanager
def in_modes_of(network: nn.Module, model: nn.Module) -> Iterator[None]:
    """Inside, such layers of an average are in the network's modes, so that their weights mean the same."""
    if not any(map(acts, modules(network))):
        yield
        return
    acting = [(name, layer) for name, layer in network.named_modules() if acts(layer)]
    modes = {name: layer.training for name, layer in unwrapped(model).named_modules()}
    try:
        for name, layer in acting:
            layer.train(modes.get(name, False))
        yield
    finally:
        network.eval()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside, all of ``network`` is in evaluation mode; on leaving, each module has its mode back."""
    training = [layer for layer in network.modules() if layer.training]
    acting = any(acts(layer) for layer in training)
    modes = [(layer, layer.training) for layer in network.modules()] if acting else [(each, True) for each in training]
    if acting:
        network.eval()
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes:
            if acting and acts(layer):
                layer.train(mode)
        for layer, mode in modes:
            layer.training = mode
