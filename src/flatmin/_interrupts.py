"""Ctrl-C, and a plain kill where it is one, held back while something must not be left half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Held:
    """The signals that came while `held` holds them back."""

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: list[int] = []

    def check(self) -> None:
        """Lets what has come act now, which is to raise `KeyboardInterrupt` unless the program has chosen otherwise."""
        while self._noted:
            number = self._noted.pop(0)
            self._before[number](number, None)

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals act in the main thread alone
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # one that is ignored, or ends the process, goes on to
                self._before[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)

    def _release(self) -> None:
        try:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        finally:  # again, if one came as soon as it could
            for number, handler in self._before.items():
                signal.signal(number, handler)


@contextmanager
def held() -> Iterator[Held]:
    """Holds Ctrl-C back until the block ends, or calls `Held.check`.

    The exception that it raises can come between any two instructions: of code that has taken a lock and not yet
    entered its ``try``, or has written half a file. Nothing is held back outside of the main thread.
    """
    signals = Held()
    try:
        signals._hold()
        yield signals
    finally:
        signals._release()
        signals.check()
