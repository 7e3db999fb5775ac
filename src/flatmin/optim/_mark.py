"""Finds a first pass that adds to gradients that were there before it, which the second pass would not have."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from .._distributed import local


class Seen:
    """The gradient that the last step was made with: not 0, if nobody has touched it since."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        found = _gradient(parameters)
        self._gradient = None if found is None else weakref.ref(found)
        self._version = None if found is None else found._version

    def is_untouched(self, gradient: Tensor) -> bool:
        """Whether ``gradient`` is that one."""
        return self._gradient is not None and self._gradient() is gradient and gradient._version == self._version


class Mark:
    """A NaN in one element of one gradient: a pass that clears the gradients leaves nothing of it.

    No element is marked where there is no gradient, or where it is 0, to which a pass may add.

    Args:
        parameters: The optimizer's.
        seen: The gradient of the last step, whose elements need not be looked at.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[Tensor], seen: Seen | None) -> None:
        self._gradient = self._element = None
        gradient = _gradient(parameters)
        if gradient is None:
            return
        values = local(gradient)
        self._gradient, self._element = gradient, values[(slice(0, 1),) * values.ndim]
        self._before = self._element.clone()
        if seen is not None and seen.is_untouched(gradient):
            self._element.fill_(float("nan"))
        else:  # without reading it
            self._element.copy_(torch.where(values.any(), torch.nan, self._element))
        self._version = gradient._version

    def is_left(self, gradients: list[Tensor]) -> bool:
        """Whether it is all that is not finite in ``gradients``, those after the pass."""
        if self._element is None or not any(gradient is self._gradient for gradient in gradients):
            return False
        if not self._element.isnan().all():
            return False
        return sum(int(local(gradient).isfinite().logical_not().sum()) for gradient in gradients) == 1

    def is_left_on_device(self, gradients: list[Tensor]) -> Tensor | None:
        """The same of this one gradient, as a flag on the device; None where it cannot be told."""
        marked = self._gradient
        if marked is None or self._element is None or not any(gradient is marked for gradient in gradients):
            return None
        values = local(marked)
        return (values.isnan().sum() == 1) & self._element.isnan().all() if values.numel() > 1 else None

    def remove_if_untouched(self) -> None:
        """Removes it where nothing was done to that tensor, which may have been set as the gradient once more."""
        if self._gradient is not None and self._gradient._version == self._version:
            self.remove()

    @torch.no_grad()
    def remove(self) -> None:
        """Puts the element back, if the NaN is still there: somebody may hold that tensor."""
        if self._element is not None:
            self._element.copy_(torch.where(self._element.isnan(), self._before, self._element))
        self._gradient = self._element = None


def _gradient(parameters: Iterable[Tensor]) -> Tensor | None:
    """The smallest gradient of those that are trained."""
    found = [
        parameter.grad
        for parameter in parameters
        if parameter.requires_grad and parameter.grad is not None and parameter.grad.layout == torch.strided
    ]
    return min((each for each in found if local(each).numel()), key=Tensor.numel, default=None)
