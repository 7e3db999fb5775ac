"""Says that a network is evaluated with batch-norm statistics of other weights than its own."""

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._foreach import global_norm

# Of the length of the weights. Moved by a hundredth of it nothing was lost here, by 4 % up to a point of accuracy, by a
# tenth two (docs/methods/msam.md).
FAR = 0.03


class FarStatistics:
    """Looks, at the first forward pass in evaluation mode after a step, how far the passes of that step were moved.

    A method of one pass sees each batch at moved weights alone, so that the running statistics are theirs. Whoever
    makes them anew, as ``torch.optim.swa_utils.update_bn`` does, runs the network in training mode without gradients.

    Args:
        method: The method's name.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._rho: float | None = None  # of the last step, while the statistics are those of its pass
        self._over = False

    def step_made(self, rho: float) -> None:
        """After a step whose pass was ``rho`` away."""
        self._rho = rho

    def forward(self, module: nn.Module) -> None:
        """Before a forward pass of a network that is none of training."""
        rho = self._rho
        if rho is None or self._over:
            return
        self._rho = None  # looked at, or made anew
        if module.training or not any(_keeps(layer) for layer in module.modules()):
            return
        weights = [weight.detach() for weight in module.parameters() if weight.requires_grad]
        norm = float(global_norm(weights))  # waits for the device, at most once in an evaluation
        if rho <= FAR * norm:
            return
        self._over = True
        warnings.warn(
            f"{self._method} trains batch norm at weights that are moved by {rho / norm:.0%} of their length, and the "
            "running statistics are theirs: make them anew before you evaluate, by "
            "torch.optim.swa_utils.update_bn(loader, model), or give a smaller rho",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )


def _keeps(layer: nn.Module) -> bool:
    return isinstance(layer, _NormBase) and layer.running_mean is not None
