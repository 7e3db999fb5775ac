"""Leaves a model and all random numbers as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, *, batch_statistics: bool) -> Iterator[None]:
    """Puts a model into evaluation mode inside; on leaving, every module's mode and all random states are as before.

    Args:
        model: The network.
        device: Where it is; this device's random state is kept too.
        batch_statistics: Whether batch- and instance-norm layers are in training mode all the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    words = None if numpy is None else numpy.random.get_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    place = () if device.type == "mps" else (device,)
    own = None if accelerator is None else accelerator.get_rng_state(*place)
    state = torch.get_rng_state()
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
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(words)
        torch.set_rng_state(state)
        if accelerator is not None:
            accelerator.set_rng_state(own, *place)


def seed_all(seed: int) -> None:
    """Seeds what loaders and data sets draw from, so that every pass sees the same samples in the same order."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
