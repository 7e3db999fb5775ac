"""The states of all random number generators that a training may draw from."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from .errors import DataError, require


def random_states(device: torch.device) -> dict[str, Any]:
    """Returns the states of torch's generators, on the CPU and on all devices of ``device``'s type, Python's, numpy's.

    They are tensors and plain values, as a checkpoint stores them.
    """
    version, numbers, gauss = random.getstate()
    _, words, *rest = require("numpy", install="flatmin[cli]").random.get_state()
    return {
        "torch": torch.get_rng_state(),
        device.type: _device_states(device),
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [torch.tensor(words.tolist()), *rest],
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets what `random_states` returned; a device that is not here now, or was not then, is left as it is.

    Raises:
        DataError: If numpy's is none; what torch and Python raise says the same of theirs.
    """
    torch.set_rng_state(states["torch"])
    _set_device_states(device, states.get(device.type, []))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    words, place, has_gauss, gauss = states["numpy"]
    words = words.tolist()
    # numpy takes any place, and crashes at the next number that it draws.
    fits = len(words) == 624 and all(type(word) is int and 0 <= word < 2**32 for word in words)
    if not (fits and type(place) is int and 0 <= place <= 624 and has_gauss in (0, 1) and isinstance(gauss, float)):
        raise DataError(f"numpy's random state is none: {len(words)} words, {place!r:.40}, {has_gauss!r:.40}")
    numpy = require("numpy", install="flatmin[cli]")
    numpy.random.set_state(("MT19937", numpy.array(words, dtype="uint32"), place, has_gauss, gauss))


def _device_states(device: torch.device) -> list[torch.Tensor]:
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    if hasattr(module, "get_rng_state_all"):  # cuda, xpu
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]  # mps, of which there is one


def _set_device_states(device: torch.device, states: list[torch.Tensor]) -> None:
    if device.type == "cpu":
        return
    module = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state_all"):
        for state in states:
            module.set_rng_state(state)
        return
    for number, state in zip(range(module.device_count()), states, strict=False):
        module.set_rng_state(state, number)
