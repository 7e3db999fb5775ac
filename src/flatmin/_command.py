"""Ctrl-C and a plain kill of the command ``flatmin``: one line and exit code 2, from its first moment to its last.

Importing torch takes seconds, so `begin` runs before that if this process is the command.
"""

import _thread
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePath
from types import FrameType
from typing import Any, NoReturn

from ._interrupts import SIGNALS

PATIENCE = 5.0  # seconds for an orderly end, in which signals change nothing


class _Stage(enum.Enum):
    STARTING = "nothing has been done"  # a signal ends the process
    WORKING = "something may be half done"  # raises KeyboardInterrupt, once
    ENDED = "all is done or said"  # has no effect


_stage = _Stage.STARTING
_first: float | None = None  # when the first signal came in the work
_over = 0.0  # when the work had ended
_number = signal.SIGINT  # and which
_owner = 0  # the process whose signals these are, and not those that it forks


def begin() -> None:
    """Takes over the signals, but for those that the caller of the command has chosen to ignore."""
    global _stage, _first, _owner
    if threading.current_thread() is not threading.main_thread():
        return
    _stage, _first, _owner = _Stage.STARTING, None, os.getpid()
    sys.unraisablehook = _unraisable
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)


@contextmanager
def commanded() -> Iterator[None]:
    """Runs one command: what was chosen for the signals before holds again after it."""
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    begin()
    try:
        yield
    finally:
        ended()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None is one that Python knows nothing of
                    signal.signal(number, handler)
            sys.unraisablehook = hook


def working() -> None:
    """From here on, a signal raises `KeyboardInterrupt`."""
    global _stage
    _stage = _Stage.WORKING


def ended() -> None:
    """From here on, a signal has no effect: all is done, or has been said, and the process is about to end."""
    global _stage, _over
    _stage, _over = _Stage.ENDED, time.monotonic()


def leave(code: int) -> NoReturn:
    """Ends the process; not even what Python does at the end is disturbed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def interrupted() -> bool:
    """Whether a signal has come while the command was working."""
    return _first is not None


def _received(number: int, frame: FrameType | None) -> None:
    global _first, _number
    if os.getpid() != _owner:  # a loader's worker: the command notices the signal itself, and that its work has ended
        os._exit(0)
    if _stage is _Stage.ENDED:
        if time.monotonic() - _over > PATIENCE:  # it waits for whoever reads what it prints
            _end_now("interrupted after the work")
        return
    if _stage is _Stage.STARTING:
        _end_now("interrupted before anything was done")
    if _first is None:
        _first, _number = time.monotonic(), signal.Signals(number)
        raise KeyboardInterrupt
    if time.monotonic() - _first > PATIENCE:
        _end_now("interrupted again, and ended at once; every file that was written before is whole")


def _end_now(line: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # of several ranks one speaks
        with suppress(OSError):
            show_cursor = "\r\x1b[?25h\x1b[K" if os.isatty(2) else ""
            os.write(2, f"{show_cursor}flatmin: {line}\n".encode())
    os._exit(2)


def _unraisable(found: Any) -> None:
    """Sends a signal again that came while Python was calling what must not raise, such as ``__del__``."""
    global _first
    if found.exc_type is KeyboardInterrupt and _first is not None:
        _first = None
        soon = threading.Timer(0.01, _send_again)  # here it would be swallowed again
        soon.daemon = True
        soon.start()
    else:
        sys.__unraisablehook__(found)


def _send_again() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, _number)  # also wakes it
    else:  # Windows
        _thread.interrupt_main(_number)


def _is_command() -> bool:
    """Whether this process is the command, as the package is imported: ``python -m flatmin`` or the console script."""
    given = sys.orig_argv  # as typed; of the processes that a comparison starts, another
    if sys.argv[:1] == ["-m"]:
        return "-m" in given and given[given.index("-m") + 1 :][:1] == ["flatmin"]
    return sys.argv[:1] != [] and sys.argv[0] in given[1:] and PurePath(sys.argv[0]).stem == "flatmin"


if _is_command():
    begin()
