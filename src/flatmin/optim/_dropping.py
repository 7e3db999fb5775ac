"""Drops steps on the device: whether a gradient was finite is known there at once, and to the host when it has waited.

A step is made in any case, and what the base optimizer has changed is put back where the gradient was not finite. The
host is told one step later, when nothing is left to wait for.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._foreach import Backup, put_back_


class Dropping:
    """Steps of a base optimizer of which it is not known yet whether they are dropped."""

    def __init__(self) -> None:
        self._stepped: set[Tensor] = set()  # parameters of which the base optimizer has made what it remembers
        self._states = 0  # how many of them have any
        self._flags: _Flags | None = None  # of the last step
        self._host: list[tuple[Tensor, Tensor]] = []  # counters on the host, and what they were before it

    def can(self, base: Optimizer, parameters: list[Tensor]) -> bool:
        """Whether a step of ``parameters`` can be dropped on the device.

        If not, the host has to know before it is made: of optimizers that are not torch's own, which may remember
        anything anywhere; and of parameters in their first step, after which there is a state that was not.
        """
        known = self._stepped.issuperset(parameters) and len(base.state) == self._states
        return known and all(type(each).__module__.startswith("torch.optim.") for each in _each(base))

    def step(self, base: Optimizer, parameters: list[Tensor], bad: Tensor | None, left: Tensor | None = None) -> None:
        """Makes a step, of which nothing is left where ``bad`` is True.

        Args:
            base: The base optimizer.
            parameters: Those with a gradient.
            bad: Whether the step is dropped, on the device; None: it is known that it is not.
            left: What else the host is to be told.
        """
        with ExitStack() as stack:
            if bad is not None:
                self._flags = _Flags(bad, torch.zeros_like(bad) if left is None else left)
                self._host = []
                for optimizer in _each(base):
                    if _takes_flag(optimizer):
                        stack.enter_context(_told(optimizer, bad))
                    else:
                        stack.enter_context(self._put_back_after(optimizer, set(parameters), bad))
            base.step()
        self._stepped.update(parameters)
        self._states = len(base.state)

    def settle(self) -> tuple[bool, bool] | None:
        """What became of the last step: whether it was dropped, and ``left``. Waits until it is made.

        Returns:
            None if that was asked before, or was known beforehand.
        """
        if self._flags is None:
            return None
        (dropped, left), self._flags = self._flags.read(), None
        for tensor, before in self._host if dropped else ():
            tensor.copy_(before)
        self._host = []
        return dropped, left

    @contextmanager
    def _put_back_after(self, optimizer: Optimizer, stepped: set[Tensor], bad: Tensor) -> Iterator[None]:
        """Inside, what a step of ``optimizer`` has changed is put back before its hooks can see it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in stepped]
        places = [
            (optimizer.state[parameter], name, value)
            for parameter in parameters
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        ]
        self._host += [(value, value.clone()) for _, _, value in places if _is_on_host(value, bad)]
        places = [place for place in places if not _is_on_host(place[2], bad)]
        backup = Backup([*parameters, *(value for _, _, value in places)])

        def put_back(*_: Any) -> None:
            backup.put_back_(bad)
            if other := [(state[name], value) for state, name, value in places if state[name] is not value]:
                put_back_([new for new, _ in other], [old for _, old in other], bad)

        handle, hooks = optimizer.register_step_post_hook(put_back), cast(Any, optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(handle.id, last=False)
        try:
            yield
        finally:
            handle.remove()


class _Flags:
    """Two flags on their way from a device to the host."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._flags = torch.stack((first, second)).to("cpu", non_blocking=True)
        self._event: Any = None
        if first.device.type != "cpu":
            module = torch.get_device_module(first.device)
            self._event = module.Event()
            self._event.record(module.current_stream(first.device))  # which need not be the current device's

    def read(self) -> tuple[bool, bool]:
        """Returns them; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        first, second = self._flags.tolist()
        return first, second


def _each(base: Any) -> tuple[Any, ...]:
    """The optimizer, or those that are joined in it."""
    return tuple(getattr(base, "optimizers", (base,)))


def _is_on_host(tensor: Tensor, flag: Tensor) -> bool:
    return tensor.device.type == "cpu" != flag.device.type


def _takes_flag(optimizer: Any) -> bool:
    """Whether it leaves a step out by ``found_inf``, as fused optimizers do for a `GradScaler`."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


@contextmanager
def _told(optimizer: Any, bad: Tensor) -> Iterator[None]:
    optimizer.found_inf = bad.float()
    try:
        yield
    finally:
        del optimizer.found_inf
