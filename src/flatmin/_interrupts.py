"""Ctrl-C, and a plain kill where it is one, held back while something must not be left half done."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Held:
    """The signals that came while `held` holds them back."""

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: list[int] = []
        self._acted: float | None = None  # when

    @property
    def noted(self) -> bool:
        """Whether one has come that has not acted, or again, a second or more after one that has."""
        return bool(self._noted)

    def check(self) -> None:
        """Lets what has come act now, which is to raise `KeyboardInterrupt` unless the program has chosen otherwise."""
        noted, self._noted = dict.fromkeys(self._noted), []
        for number in noted:
            self._acted = time.monotonic()
            self._before[number](number, None)

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals act in the main thread alone
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):  # one that is ignored, or ends the process, goes on to
                self._before[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._acted is None or time.monotonic() - self._acted > 1.0:  # it is often sent twice at once
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
    """Holds Ctrl-C back until the block ends, or calls `Held.check`; after that, more of them count as the same.

    The exception that it raises can come between any two instructions: of code that has taken a lock and not yet
    entered its ``try``, or has written half a file. Nothing is held back outside of the main thread.
    """
    signals = Held()
    try:
        signals._hold()
        yield signals
    finally:
        signals._release()
        if signals._acted is None:
            signals.check()
