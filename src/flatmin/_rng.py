"""States of random number generators (torch's on every device, Python's, numpy's): the one place that touches them."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

CPU = torch.device("cpu")
States = list[tuple[torch.device, Tensor]]


def torch_states(devices: Iterable[torch.device]) -> States:
    """The states of torch's generators on ``devices``. The host holds an accelerator's too, so nothing waits for it."""
    return [(device, _module(device).get_rng_state(*_which(device))) for device in devices if _module(device)]


def set_torch_states(states: States) -> None:
    """Sets what `torch_states` returned."""
    for device, state in states:
        _module(device).set_rng_state(state, *_which(device))


@dataclass
class Everywhere:
    """The states of torch's generators on some devices, of Python's and, if it is imported, of numpy's."""

    tensors: States
    python: Any
    numpy: Any

    @classmethod
    def on(cls, devices: Iterable[torch.device]) -> "Everywhere":
        """The states as they are now."""
        numpy = _numpy()
        return cls(torch_states(devices), random.getstate(), None if numpy is None else numpy.random.get_state())

    def set(self) -> None:
        """Sets the generators to them."""
        set_torch_states(self.tensors)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def numpy_is_as_in(self, other: "Everywhere") -> bool:
        """Whether numpy's state is the same in both."""
        (kind, words, *rest), (other_kind, other_words, *others) = self.numpy, other.numpy
        return bool(kind == other_kind and rest == others and (words == other_words).all())


@contextmanager
def replayed(states: Everywhere | None) -> Iterator[None]:
    """Goes back to ``states`` inside, and on leaving to where the generators were before; nothing for None."""
    if states is None:
        yield
        return
    now = Everywhere.on(device for device, _ in states.tensors)
    if states.numpy is None or states.numpy_is_as_in(now):  # to set numpy's is slow, and nobody has drawn from it
        states, now = replace(states, numpy=None), replace(now, numpy=None)
    try:
        states.set()
        yield
    finally:
        now.set()


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """On leaving, the generators of torch (CPU and ``device``), Python and numpy are as they were before."""
    states = Everywhere.on({CPU, device})
    try:
        yield
    finally:
        states.set()


def seed_all(seed: int, *, accelerators: bool = True) -> None:
    """Seeds what data sets and networks draw from: torch's generators, Python's and, if it is imported, numpy's.

    Args:
        seed: At least 0.
        accelerators: Whether torch's generators on accelerators are seeded too.
    """
    if accelerators:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds the generators of torch (CPU and ``device``), Python and numpy inside; afterwards they are as before."""
    with preserved(device):
        seed_all(seed, accelerators=False)
        if device.type != "cpu" and (module := _module(device)) is not None:
            with module.device(device) if hasattr(module, "device") else nullcontext():
                module.manual_seed(seed)
        yield


def state_dict(device: torch.device) -> dict[str, Any]:
    """Returns all generators' states as tensors and plain values, which a checkpoint can store.

    Those are torch's on the CPU and on all devices of ``device``'s type, Python's and, if it is imported, numpy's.
    """
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        device.type: _device_states(device),
        "python": [version, torch.tensor(numbers), gauss],
    }
    if (numpy := _numpy()) is not None:
        _, words, *rest = numpy.random.get_state()
        states["numpy"] = [torch.tensor(words.tolist()), *rest]
    return states


def load_state_dict(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets what `state_dict` returned; devices that are missing on either side are left as they are.

    Raises:
        DataError: If numpy's state is invalid. What torch and Python raise says the same of theirs.
    """
    torch.set_rng_state(states["torch"])
    _set_device_states(device, states.get(device.type, []))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    if (numpy := _numpy()) is None or "numpy" not in states:
        return
    words, place, has_gauss, gauss = states["numpy"]
    words = words.tolist()
    # numpy takes any place, and crashes at the next number that it draws.
    fits = len(words) == 624 and all(type(word) is int and 0 <= word < 2**32 for word in words)
    if not (fits and type(place) is int and 0 <= place <= 624 and has_gauss in (0, 1) and isinstance(gauss, float)):
        raise DataError(f"numpy's random state is invalid: {len(words)} words, {place!r:.40}, {has_gauss!r:.40}")
    numpy.random.set_state(("MT19937", numpy.array(words, dtype="uint32"), place, has_gauss, gauss))


def _numpy() -> Any:
    """The numpy module if it is imported: it is no dependency, and what is not imported draws no numbers."""
    return sys.modules.get("numpy")


def _module(device: torch.device) -> Any:
    """The torch module that holds the generator of ``device``; None if there is none."""
    if device == CPU:
        return torch
    module = None if device.type == "meta" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that names the device to that module's functions; the CPU and mps have one generator each."""
    return () if device.type in ("cpu", "mps") else (device,)


def _device_states(device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    if hasattr(module, "get_rng_state_all"):  # cuda, xpu
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]  # mps, of which there is one


def _set_device_states(device: torch.device, states: list[Tensor]) -> None:
    if device.type == "cpu":
        return
    module = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state_all"):
        for state in states:
            module.set_rng_state(state)
        return
    for number, state in zip(range(module.device_count()), states, strict=False):
        module.set_rng_state(state, number)
