"""Leaves a model and all random numbers as they were."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .._rng import preserved


@contextmanager
def undisturbed(
    model: nn.Module, device: torch.device, generators: Iterable[torch.Generator] = (), *, batch_statistics: bool
) -> Iterator[None]:
    """Puts a model into evaluation mode inside; on leaving, every module's mode and all random states are as before.

    Args:
        model: The network.
        device: Where it is; this device's random state is kept too.
        generators: Others that are kept, such as a DataLoader's own.
        batch_statistics: Whether batch- and instance-norm layers are in training mode all the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(generator, generator.get_state()) for generator in generators]
    with preserved(device):
        try:
            model.eval()
            if batch_statistics:
                for module in model.modules():
                    module.training = isinstance(module, _NormBase)
            # Whatever the caller is in: gradients are needed here, and the precision is the one asked for.
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for generator, state in states:
                generator.set_state(state)
