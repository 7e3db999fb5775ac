"""Notices another optimizer that trains the rest of the network with the gradient of the same pass."""

import warnings
import weakref
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._joined import Joined

# A part, and its parameters: the rest of the network, which nobody perturbs.
Rest = list[tuple[Optimizer, list[Tensor]]]
Note = tuple[TensorWeakRef, int]  # a gradient, and how often it was written to


class Beside:
    """Warns once of an optimizer that steps the rest of the network with a gradient that the passes have left.

    Two networks that are trained in turn, as in a GAN, are none: the other's gradient is cleared and computed anew.
    Parameters that no optimizer trains are none either.

    Args:
        name: The method's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._base = ""
        self._before: dict[Tensor, Note] = {}
        self._left: weakref.WeakKeyDictionary[Optimizer, Note] = weakref.WeakKeyDictionary()
        self._parameters: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
        self._hooks: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
        self._warned = False

    def begin(self, rest: Rest) -> None:
        """Before a step: notes the gradients that there are."""
        self._left.clear()
        self._before = {p: note for _, parameters in rest for p in parameters if (note := _note(p)) is not None}

    def end(self, rest: Rest, base: Optimizer) -> None:
        """When the last pass of a step is made, at perturbed weights: notes a gradient that it has written."""
        before, self._before = self._before, {}
        if self._warned:
            return
        self._base = "..." if isinstance(base, Joined) else type(base).__name__
        for optimizer, parameters in rest:
            for parameter in parameters:
                note = _note(parameter)
                if note is not None and not _same(note, before.get(parameter)):
                    self._left[optimizer] = note
                    self._parameters[optimizer] = weakref.ref(parameter)
                    self._watch(optimizer)
                    break

    def _watch(self, optimizer: Optimizer) -> None:
        if optimizer in self._hooks:
            return
        this = weakref.ref(self)

        @_disable_dynamo
        def before_step(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            beside = this()
            if beside is not None and not any(map(callable, (*args[1:], *kwargs.values()))):  # or it computes its own
                beside._look_at(stepped)

        try:
            self._hooks[optimizer] = optimizer.register_step_pre_hook(before_step)
        except AttributeError:  # a trainer's wrapper, around one that is found too
            self._hooks[optimizer] = None
            return
        weakref.finalize(self, self._hooks[optimizer].remove)

    def _look_at(self, optimizer: Optimizer) -> None:
        left = self._left.pop(optimizer, None)
        parameter = None if left is None else self._parameters[optimizer]()
        now = None if parameter is None else _note(parameter)
        # To unscale or clip it writes once, to clear and compute it anew twice.
        if self._warned or left is None or now is None or now[0]() is not left[0]() or now[1] - left[1] > 1:
            return
        self._warned = True
        other = type(optimizer).__name__
        warnings.warn(
            f"{other} trains a part of the network beside {self._name}, and steps with the gradient of {self._name}'s "
            f"pass, in which that part was not perturbed: make one of both, {self._name}([{self._base}, {other}], "
            f"...), with one perturbation over all, and with parameters= if it is to be over a part (warned once)",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )


def _note(parameter: Tensor) -> Note | None:
    gradient = parameter.grad
    return None if gradient is None else (TensorWeakRef(gradient), gradient._version)


def _same(note: Note, other: Note | None) -> bool:
    return other is not None and note[0]() is other[0]() and note[1] == other[1]
