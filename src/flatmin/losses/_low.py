"""An average's weights in half precision, for passes under autocast."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..averages._layers import layers, named_layers
from ._side import Side

# Layers that autocast runs in half precision, so that it casts their weights in each pass.
CAST = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class LowWeights:
    """Calls a network with the weights that autocast would cast cast already, all at once; bit-identical to it.

    They are cast anew in each call, since in a recorded graph that is a single kernel beside the training. Copies that
    whoever moves the weights had to keep could go stale.

    Args:
        network: The network, float32.
        dtype: autocast's.
        side: Where it runs.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, side: Side) -> None:
        shared = Counter(parameter for layer in layers(network) for parameter in layer._parameters.values())
        self._network = network
        self._full: dict[str, Tensor] = {}
        for path, layer in named_layers(network):
            if type(layer) in CAST:  # none of their subclasses, which may compute with their weights
                for name, parameter in layer._parameters.items():
                    if parameter is not None and parameter.dtype == torch.float32 and shared[parameter] == 1:
                        self._full[f"{path}.{name}" if path else name] = parameter
        self._low = dict(zip(self._full, side.empty_like(list(self._full.values()), dtype), strict=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network."""
        if self._low:
            torch._foreach_copy_(list(self._low.values()), [full.detach() for full in self._full.values()])
        return functional_call(self._network, self._low, args, kwargs)
