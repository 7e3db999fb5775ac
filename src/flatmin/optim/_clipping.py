"""Notices that torch's functions clip the gradient of a pass, where ``max_norm`` or a later clip would do otherwise."""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._perturbation import Elementwise, unit

if TYPE_CHECKING:
    from ._step import Step

# Each of torch's functions that clip gives the gradients to this global of its module, by whatever name it was imported
# and whoever calls it. Of a torch without it nothing is noticed.
GLOBAL = "_group_tensors_by_device_and_dtype"
BOUNDS = {"clip_grad_norm_": "max_norm", "_clip_grads_with_norm_": "max_norm", "clip_grad_value_": "clip_value"}

_between: "weakref.WeakSet[Clipping]" = weakref.WeakSet()  # of loops that call perturb() and restore()
_lock = threading.RLock()  # a generator that is collected meanwhile may end a pass
_watching = 0  # in how many passes, of all threads
_thread = threading.local()


class Clipping:
    """Warns once of clipping in a pass that makes another step than clipping the gradient to step with.

    The first gradient of two is used for its direction by most methods: one factor for all of it changes nothing, to
    clip each value or some of the tensors turns it.

    Args:
        name: The method's.
        first: Whether more of the first gradient matters than its direction.
        both: Whether the gradient to step with is made of both.
    """

    def __init__(self, name: str, *, first: bool, both: bool) -> None:
        self._name, self._first, self._both = name, first, both
        self._warned = False
        self._noted: list[tuple[_Clip, list[weakref.ref[Tensor]]]] = []

    @contextmanager
    def watched(self, step: "Step", which: str) -> Iterator[None]:
        """Inside, a pass is made: the ``"first"``, the ``"second"`` or the ``"only"`` one."""
        if self._warned:
            yield
            return
        where = f"in a pass of {self._name}"
        with _seen(lambda gradients, frame: self._look_at(step, which, gradients, _Clip(frame), where)):
            yield

    def note(self, gradients: list[Tensor], frame: FrameType) -> None:
        """Notes what a loop that calls ``perturb()`` has clipped between its calls, perhaps of the first gradient."""
        if not self._warned:
            self._noted.append((_Clip(frame), list(map(weakref.ref, gradients))))

    def judge(self, step: "Step") -> None:
        """Looks at what was clipped up to here, where the first pass of a step of such a loop is over."""
        for clip, references in self._noted:
            clipped = [gradient for reference in references if (gradient := reference()) is not None]
            self._look_at(step, "first", clipped, clip, f"before perturb() of {self._name}")
        self.forget()
        if self not in _between:  # from here on
            _between.add(self)
            _watch(1)
            weakref.finalize(self, _watch, -1).atexit = False

    def forget(self) -> None:
        """What was clipped up to here is not of the first gradient."""
        self._noted.clear()

    def _look_at(self, step: "Step", which: str, gradients: list[Tensor], clip: "_Clip", where: str) -> None:
        if self._warned or clip.bound == float("inf"):  # as one measures the norm
            return
        clipped = {id(gradient) for gradient in gradients}
        own = [parameter for parameter in step.every() if id(parameter.grad) in clipped]
        why = self._why(step, which, own, by_value=clip.by_value) if own else ""
        if not why:
            return
        self._warned = True
        norm = "..." if clip.by_value else f"{clip.bound:g}"
        later = "" if which == "only" else ", or clip between restore() and step()"
        warnings.warn(
            f"{clip.called}(..., {clip.bound:g}) {where} clips its {which} gradient, {why}: "
            f"leave it out and make it {self._name}(..., max_norm={norm}), which clips the gradient that the base "
            f"optimizer steps with{later} (warned once)",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )

    def _why(self, step: "Step", which: str, own: list[Tensor], *, by_value: bool) -> str:
        """What is wrong with clipping the gradients of ``own`` in this pass; empty if nothing is."""
        if step.scale.is_in_gradients():
            return "which the scaler has scaled"
        if which == "second":
            return "which changes the step" if self._both else ""
        if which == "only" or (step.second_runs is False and not step.decides):
            return ""
        if step.decides:
            return "whose length when= looks at"
        if self._first or not (step.scaling is unit or isinstance(step.scaling, Elementwise)):
            return "which changes the step"
        moved = [parameter for parameter in step.candidates() if parameter.grad is not None]
        some = len(set(moved).intersection(own))
        return "which turns the perturbation" if some and (by_value or some < len(moved)) else ""


class _Clip:
    """A call of one of torch's functions, of which ``frame`` is the innermost that clips.

    Attributes:
        called: The function that was called.
        bound: What it clips to.
        by_value: Whether it clips each value.
    """

    def __init__(self, frame: FrameType) -> None:
        function = frame.f_code.co_name
        self.by_value = function == "clip_grad_value_"
        self.bound = float(frame.f_locals.get(BOUNDS[function], 0.0))
        name, outer = "", frame
        while outer.f_code.co_filename == frame.f_code.co_filename and outer.f_back is not None:
            name = outer.f_code.co_name if outer.f_code.co_name in BOUNDS else name
            outer = outer.f_back
        self.called = name.lstrip("_")


@contextmanager
def _seen(look: Callable[[list[Tensor], FrameType], None]) -> Iterator[None]:
    """Inside, ``look`` is called with what this thread clips by torch's functions, before they do, and their frame."""
    before, _thread.look = getattr(_thread, "look", None), look
    _watch(1)
    try:
        yield
    finally:
        _watch(-1)
        _thread.look = before


def _watch(change: int) -> None:
    """Puts the wrapper into torch's module for the first one who watches, and takes it out for the last."""
    global _watching
    with _lock:
        _watching += change
        found = getattr(clip_grad, GLOBAL, None)
        if _watching and found is not None and not isinstance(found, _Wrapper):
            setattr(clip_grad, GLOBAL, _Wrapper(found))
        elif not _watching and isinstance(found, _Wrapper):
            setattr(clip_grad, GLOBAL, found.wrapped)


class _Wrapper:
    """What stands in for torch's function."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        self.wrapped = wrapped

    def __call__(self, groups: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            look, frame = getattr(_thread, "look", None), sys._getframe(1)
            if frame.f_code.co_name in BOUNDS:
                if look is not None:
                    look(groups[0], frame)
                else:
                    for each in list(_between):
                        each.note(groups[0], frame)
        return self.wrapped(groups, *args, **kwargs)
