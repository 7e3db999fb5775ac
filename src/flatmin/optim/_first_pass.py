"""What a step begins with, where its first pass is in the user's loop and over before the optimizer knows of it."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._passes import current_pass
from .._rng import CPU, Everywhere
from ._surroundings import Buffers

MOST = 1024  # forward passes of a step whose random numbers are kept


@dataclass
class Beginning:
    """What there was before the first pass of a step.

    Attributes:
        buffers: The network's; None if nobody knows them.
        random: The states of the generators before each of its forward passes; empty if nobody knows them.
        seen: Whether the hook has seen that pass.
        inside: Whether the optimizer is told of that pass, or of its last micro-batch, while it is made.
    """

    buffers: Buffers | None = None
    random: list[Everywhere] = field(default_factory=list)
    seen: bool = False
    inside: bool = False


class Beginnings:
    """Keeps the `Beginning` of the next step, by a hook on the network, if there is one that is known.

    In training, the first forward pass after a step has the buffers copied, and each has the states of the generators
    noted, unless it is in a pass that an optimizer knows of. In a second pass it goes back to them. Inside a compiled
    function no hook is run, and nothing is known.

    Args:
        model: The network. None: there is no hook.
        replay: Whether the second pass draws the random numbers of the first.
    """

    def __init__(self, model: nn.Module | None, *, replay: bool) -> None:
        self._replay = replay
        self._next = Beginning()
        self._due: Iterator[Everywhere] | None = None
        if model is not None and not isinstance(model, torch.jit.ScriptModule):  # which takes no hook
            handle = model.register_forward_pre_hook(Hook(self, model))
            weakref.finalize(self, handle.remove)

    def take(self) -> Beginning:
        """What is known of the step that has begun; of the next one nothing then."""
        begun, self._next = self._next, Beginning()
        return begun

    def note(self, buffers: Buffers | None) -> None:
        """The next step begins with these, as far as is known now."""
        self._next = Beginning(buffers)

    @contextmanager
    def replayed(self, begun: Beginning) -> Iterator[None]:
        """Inside, each forward pass draws the random numbers of the one in the first pass."""
        self._due = iter(begun.random)
        try:
            yield
        finally:
            self._due = None

    def before_forward(self, module: nn.Module) -> None:
        """Called before each forward pass of the network."""
        if self._due is not None:
            state = next(self._due, None)
            if state is not None:
                state.set()
        elif module.training and torch.is_grad_enabled() and current_pass() is None:
            if not self._next.seen:
                self._next.buffers, self._next.seen = Buffers(module.modules()), True
            if self._replay and len(self._next.random) < MOST:
                devices = {CPU, *(parameter.device for parameter in module.parameters())}
                self._next.random.append(Everywhere.on(devices))


class Hook:
    """A hook that belongs to this network and this optimizer alone: in copies of the network it does nothing."""

    def __init__(self, beginnings: Beginnings | None = None, model: nn.Module | None = None) -> None:
        self._beginnings = None if beginnings is None else weakref.ref(beginnings)
        self._model = None if model is None else weakref.ref(model)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Torch's hook before a forward pass."""
        if torch.compiler.is_compiling() or self._beginnings is None or self._model is None:
            return
        beginnings = self._beginnings()
        if beginnings is not None and self._model() is module:
            beginnings.before_forward(module)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
