"""Lets a second pass draw the random numbers of the first, so that dropout takes the same mask in both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")
States = list[tuple[torch.device, torch.Tensor]]


def random_states(devices: Iterable[torch.device]) -> States:
    """The states of torch's generators on ``devices``; on an accelerator too the host has it, and does not wait."""
    return [(device, _module(device).get_rng_state(*_which(device))) for device in devices if _module(device)]


@contextmanager
def replayed(states: States) -> Iterator[None]:
    """Goes back to ``states`` inside, and on leaving to where the generators were."""
    now = random_states(device for device, _ in states)
    try:
        _restore(states)
        yield
    finally:
        _restore(now)


def _restore(states: States) -> None:
    for device, state in states:
        _module(device).set_rng_state(state, *_which(device))


def _module(device: torch.device) -> Any:
    """What has the generator of ``device``; None if nothing has."""
    if device == CPU:
        return torch
    module = None if device.type == "meta" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What to call its functions with; of some there is but one."""
    return () if device.type in ("cpu", "mps") else (device,)
