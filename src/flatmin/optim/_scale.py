"""The loss scale of float16, whoever unscales: the optimizer in its own passes, or the loop that the passes are in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ._foreach import scale_


class LossScale:
    """The loss scale of one step.

    In the optimizer's own passes the scaler is told of one pass a step, which is all that it allows. Where the passes
    are in the user's loop, a method computes with unscaled gradients all the same, and those that it leaves are scaled
    again for ``scaler.unscale_`` or ``scaler.step``; unless the loop has unscaled those of a pass already.

    Args:
        scaler: The scaler; one that is not enabled scales by 1.
        optimizer: Whose step it is, as the loop knows it.
        outside: Whether the loop unscales, by ``scaler.unscale_(optimizer)`` or ``scaler.step(optimizer)``.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer, *, outside: bool = False) -> None:
        self._scaler, self._optimizer, self._outside = scaler, optimizer, outside
        self._factor = 0.0  # not known before the first backward pass, which may choose it
        self._done = False  # whether the loop has unscaled the gradients of the pass

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self._scaler.is_enabled()

    def factor(self) -> float:
        """What the gradients of the pass are multiplied with. Waits for the device, once a step."""
        if self._done:
            return 1.0
        if not self._factor:
            self._factor = self._scaler.get_scale()
        return self._factor

    def is_in_gradients(self) -> bool:
        """Whether the gradients of the pass under way are multiplied with it still."""
        return self.enabled and not (self._outside and has_unscaled(self._scaler, self._optimizer))

    def look(self) -> None:
        """Sees whether the loop has unscaled the gradients of the pass that is over."""
        self._done = self._outside and has_unscaled(self._scaler, self._optimizer)

    def remove(self, gradients: list[Tensor], *, last: bool) -> None:
        """Divides by the scale: of the last pass's gradients the scaler does it, and notes that they are finite."""
        if last and not self._outside:
            self._scaler.unscale_(self._optimizer)
        elif self.enabled and not self._done:
            scale_(gradients, 1 / self.factor())

    def put_back(self, gradients: list[Tensor]) -> None:
        """Scales those that a method leaves to the loop, if the loop is still to unscale them."""
        if self._outside and self.enabled and not self._done:
            scale_(gradients, self.factor())

    def begin_second(self) -> None:
        """Lets the loop unscale the second gradients too, which the scaler refuses within one step."""
        if self._done:
            self._scaler._per_optimizer_states.pop(id(self._optimizer), None)
            self._done = False

    def overflowed(self, gradients: list[Tensor]) -> None:
        """Has the scaler note that a pass was not finite, on this rank too where it was so on another alone."""
        if self.enabled:
            for gradient in gradients:
                gradient.fill_(float("inf"))
            if not self._outside:
                self._scaler.unscale_(self._optimizer)

    def settle(self) -> None:
        """Unscales what the base optimizer is about to step with, if the loop has not."""
        if self._outside and self.enabled and not has_unscaled(self._scaler, self._optimizer):
            with torch.no_grad():
                self._scaler.unscale_(self._optimizer)


@contextmanager
def noted_scaling(scalers: list[GradScaler], used: list[GradScaler]) -> Iterator[None]:
    """Inside, those of ``scalers`` that scale a loss in this thread are added to ``used``; torch does not say it."""
    before = [vars(scaler).get("scale") for scaler in scalers]
    for scaler in scalers:
        vars(scaler)["scale"] = _noting(scaler, scaler.scale, used)
    try:
        yield
    finally:
        for scaler, own in zip(scalers, before, strict=True):
            vars(scaler).pop("scale", None)
            if own is not None:
                vars(scaler)["scale"] = own


def _noting(scaler: GradScaler, scale: Callable[..., Any], used: list[GradScaler]) -> Callable[..., Any]:
    thread = get_ident()

    def noted(*args: Any, **kwargs: Any) -> Any:
        if get_ident() == thread:
            used.append(scaler)
        return scale(*args, **kwargs)

    return noted


def has_scaled(scaler: GradScaler) -> bool:
    """Whether ``scaler`` has ever scaled a loss; torch does not say it, and makes its scale with the first."""
    return getattr(scaler, "_scale", None) is not None


def is_unstepped(scaler: GradScaler) -> bool:
    """Whether ``scaler`` has scaled a loss, and was asked neither to unscale, nor to step, nor to update."""
    if not has_scaled(scaler) or getattr(scaler, "_per_optimizer_states", {}):
        return False
    return scaler.get_scale() == scaler._init_scale and scaler._get_growth_tracker() == scaler._init_growth_tracker


def has_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether ``scaler`` has unscaled the gradients of ``optimizer`` since its last update; torch does not say it."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return id(optimizer) in states and states[id(optimizer)]["stage"] is not OptState.READY
