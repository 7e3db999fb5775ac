"""The layers and tensors of a network, without what stands beside it: averages and losses that are stored on it.

A trainer's module often holds its own average, ``self.mesa = MESA(self)``, or a loss with a history. Neither is part of
the network: an average has none of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BESIDE = "_beside_network"  # a class attribute of modules that are no part of the network that holds them


class LeftOut(nn.Module):
    """Stands in an average for a loss that the network holds; like a loss in evaluation mode it returns 0."""

    def forward(self, logits: Tensor, *_: object, **__: object) -> Tensor:
        """Returns 0."""
        return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))


def is_beside(module: nn.Module) -> bool:
    """Whether a module is no part of the network that holds it."""
    return getattr(type(module), BESIDE, False)


def named_layers(
    network: nn.Module, prefix: str = "", *, every: bool = False, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without what stands beside the network; ``every`` lists a shared layer by each name."""
    seen = set() if seen is None else seen
    if network in seen:
        return
    if not every:
        seen.add(network)
    yield prefix, network
    for name, layer in network._modules.items():
        if layer is not None and not is_beside(layer):
            yield from named_layers(layer, f"{prefix}.{name}" if prefix else name, every=every, seen=seen)


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """As ``modules``, in the same order, without what stands beside the network; no names are made, which take long."""
    seen, due = set[nn.Module](), [network]
    while due:
        layer = due.pop()
        if layer in seen:
            continue
        seen.add(layer)
        yield layer
        if layer._modules:
            inner = [each for each in layer._modules.values() if each is not None and not is_beside(each)]
            due += reversed(inner)


def modules(network: nn.Module) -> list[nn.Module]:
    """As ``modules``, in the same order, with all that stands beside the network; for what is done in each step."""
    found, due = dict[nn.Module, None](), [network]
    while due:
        layer = due.pop()
        if layer not in found:
            found[layer] = None
            if layer._modules:
                due += [each for each in reversed(layer._modules.values()) if each is not None]
    return list(found)


def named_parameters(network: nn.Module, *, every: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``named_parameters``, in the same order, without what stands beside the network."""
    return _members(network, "_parameters", every)


def named_buffers(network: nn.Module, *, every: bool = False) -> Iterator[tuple[str, Tensor]]:
    """As ``named_buffers``, in the same order, without what stands beside the network."""
    return _members(network, "_buffers", every)


def _members(network: nn.Module, kind: str, every: bool) -> Iterator[tuple[str, Any]]:
    seen: set[Tensor] = set()
    for prefix, layer in named_layers(network, every=every):
        for name, tensor in getattr(layer, kind).items():
            if tensor is not None and tensor not in seen:
                if not every:
                    seen.add(tensor)
                yield f"{prefix}.{name}" if prefix else name, tensor
