"""Which pass of an optimizer's step is being made, so that a loss can be the same function in both of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A forward-backward pass of a step.

    Attributes:
        step: An object that all passes of the step share, and no other step.
        second: Whether it is the second, at perturbed weights.
    """

    step: object
    second: bool


_thread = threading.local()


def current_pass() -> Pass | None:
    """The pass that this thread is in; None outside, such as with a plain optimizer."""
    made: Pass | None = getattr(_thread, "current", None)
    return made


def steps() -> int:
    """How many steps have been ended in this thread, made or not: between two of them lies one step."""
    made: int = getattr(_thread, "steps", 0)
    return made


def end_step() -> None:
    """Tells that all passes of a step are over."""
    _thread.steps = steps() + 1


@contextmanager
def within(step: object, *, second: bool) -> Iterator[None]:
    """Marks what runs inside as a pass of ``step``."""
    before = current_pass()
    _thread.current = Pass(step, second)
    try:
        yield
    finally:
        _thread.current = before
