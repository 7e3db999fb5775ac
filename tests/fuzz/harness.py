"""What all of the fuzz suite shares: a call of the command in this process, and what no call may ever do.

A part of the suite makes its cases, calls each through `command` (or `guarded`, for a function of Python), and gives
what `Came.fault` says of each to `report`, which fails. ``--fuzz N`` draws N times as many; see `tests/conftest.py`.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatmin.errors import FlatminError, FlatminWarning
from flatmin.lab import cli

SECONDS = 20  # after which a call hangs
PLAIN = ("flatmin: warning: ",)  # lines of the command that are no error


class Hangs(BaseException):
    """A call that has not come back."""


@dataclass(frozen=True)
class Came:
    """What came of a call: the exit code, what was printed, and a traceback if an exception left the command."""

    called: str
    code: Any
    out: str
    err: str
    crash: str = ""
    hung: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith("flatmin: ") and not line.startswith(PLAIN)]

    def fault(self, *, wrong: bool | None, said: str = "", only: bool = False) -> str:
        """What is wrong with it, in a line; empty if nothing.

        Args:
            wrong: Whether the call was a mistake; None if it may be either.
            said: What the error must say.
            only: Whether nothing but the error, and warnings, may be printed.
        """
        shown = f"{self.called:.300}\n    code {self.code}, stderr: {self.err[-1500:]!r}"
        if self.hung:
            return f"hangs: {shown}"
        if self.crash or "Traceback" in self.err + self.out:
            return f"traceback: {shown}\n{self.crash[-1500:]}"
        if self.code not in (0, 2):
            return f"exit code: {shown}"
        if self.code == 0:
            return f"silent: {shown}" if wrong or self.errors else ""
        if wrong is False:
            return f"refused: {shown}"
        if len(self.errors) != 1 or self.err.splitlines()[-1] != self.errors[0]:
            return f"not one line: {shown}"
        if only and (self.out or [line for line in self.err.splitlines() if not line.startswith(PLAIN)] != self.errors):
            return f"found only after work: {shown}"
        return f"does not say {said!r}: {shown}" if said not in self.errors[0] else ""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[list[bool]]:
    """Ends what runs longer, in the main thread of a system with alarms; the list then has an item."""
    hung: list[bool] = []

    def late(*_: Any) -> None:
        hung.append(True)  # whatever catches what is raised
        raise Hangs(f"not done after {seconds} s")

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield hung
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield hung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Afterwards, signals, import path and modules of experiment files are as before."""
    handler, path, modules = signal.getsignal(signal.SIGTERM), [*sys.path], set(sys.modules)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.path[:] = path
        here = str(Path.cwd())
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(here):
                del sys.modules[name]


def command(*arguments: Any, seconds: float = SECONDS) -> Came:
    """Calls the command in this process."""
    texts = [str(argument) for argument in arguments]
    out, err, code, crash = io.StringIO(), io.StringIO(), None, ""
    with as_it_was(), limited(seconds) as hung:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.run(texts)
        except BaseException:
            crash = traceback.format_exc()
    return Came("flatmin " + " ".join(map(repr, texts)), code, out.getvalue(), err.getvalue(), crash, bool(hung))


def guarded(call: Callable[[], Any], seconds: float = SECONDS) -> tuple[Any, str]:
    """Calls a function of Python: what it returned or the FlatminError that it raised, and what is wrong with that."""
    with warnings.catch_warnings(), as_it_was(), limited(seconds) as hung:
        warnings.simplefilter("ignore", FlatminWarning)
        try:
            found = call()
        except FlatminError as error:
            found = error
        except BaseException:
            return None, "hangs" if hung else f"traceback: {traceback.format_exc()[-1500:]}"
    return found, "hangs" if hung else ""


def report(faults: list[str]) -> None:
    """Fails with all faults of a test at once."""
    found = [fault for fault in faults if fault]
    assert not found, f"{len(found)} cases:\n" + "\n".join(found[:12])


def left(folder: str = ".") -> set[str]:
    """The names in a folder, with those of its runs."""
    return {os.path.relpath(each, folder) for each in Path(folder).rglob("*") if "__pycache__" not in each.parts}
