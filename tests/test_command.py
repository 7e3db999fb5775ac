"""What a signal does to the command, by how far it is; tests/benchmarks/test_kills.py has the words themselves."""

import os
import signal
import sys
import time

import pytest

from flatmin import _command

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
AGAIN = b"flatmin: interrupted again, and ended at once; every file that was written before is whole\n"


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def said(monkeypatch):
    """What is written as the process ends, which it does by `Ended`; the handlers are as before afterwards."""
    lines = []

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", lambda descriptor, line: lines.append((descriptor, line)))
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    before = [signal.getsignal(number) for number in _command.SIGNALS], sys.unraisablehook
    yield lines
    assert ([signal.getsignal(number) for number in _command.SIGNALS], sys.unraisablehook) == before


@BOTH
def test_before_the_work_it_ends_with_a_line(said, number):
    with pytest.raises(Ended, match="2"), _command.commanded():
        signal.raise_signal(number)
    assert said == [(2, b"flatmin: interrupted before anything was done\n")]


@BOTH
def test_one_rank_speaks_for_all(said, number, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Ended, match="2"), _command.commanded():
        signal.raise_signal(number)
    assert said == []


@BOTH
def test_in_the_work_it_raises_once(said, number, monkeypatch):
    with _command.commanded():
        _command.working()
        assert not _command.interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert _command.interrupted()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert said == []
        monkeypatch.setattr(_command, "PATIENCE", -1.0)
        with pytest.raises(Ended, match="2"):
            signal.raise_signal(number)
    assert said == [(2, AGAIN)]


@BOTH
def test_after_it_nothing_happens_unless_it_does_not_end(said, number, monkeypatch):
    with _command.commanded():
        _command.working()
        _command.ended()
        signal.raise_signal(number)
        assert not _command.interrupted()
        assert said == []
        monkeypatch.setattr(_command, "PATIENCE", -1.0)
        with pytest.raises(Ended, match="2"):
            signal.raise_signal(number)
    assert said == [(2, b"flatmin: interrupted after the work\n")]


@BOTH
def test_a_process_that_the_command_has_forked_ends_without_a_word(said, number, monkeypatch):
    with pytest.raises(Ended, match="0"), _command.commanded():
        _command.working()
        monkeypatch.setattr(_command, "_owner", -1)
        signal.raise_signal(number)
    assert said == []


def test_one_that_python_swallows_comes_again(said):
    class Noisy:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with _command.commanded():
        _command.working()
        noisy = Noisy()
        with pytest.raises(KeyboardInterrupt):
            del noisy
            time.sleep(5)


def test_what_the_caller_ignores_stays_ignored(said):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _command.commanded():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == []


def test_nothing_disturbs_the_end(said):
    before = [signal.getsignal(number) for number in _command.SIGNALS]
    try:
        with pytest.raises(SystemExit, match="2"):
            _command.leave(2)
        for number in _command.SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in zip(_command.SIGNALS, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("argv", "typed", "command"),
    [
        (["-m", "train"], ["python", "-m", "flatmin", "train"], True),
        (["-m", "train"], ["python", "-X", "dev", "-u", "-m", "flatmin", "train"], True),
        (["/env/bin/flatmin", "train"], ["/env/bin/python", "/env/bin/flatmin", "train"], True),
        (["-m"], ["python", "-m", "flatmin.lab"], False),
        (["-m"], ["python", "-m", "pytest", "flatmin"], False),
        (["-c"], ["python", "-c", "import flatmin"], False),
        (["script.py", "flatmin"], ["python", "script.py", "flatmin"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
        # a process that a comparison has started, once it has taken over the arguments
        (["/env/bin/flatmin", "compare"], ["python", "-c", "from multiprocessing.spawn ...", "--fork"], False),
        (["-m", "compare"], ["python", "-c", "from multiprocessing.spawn ...", "--fork"], False),
    ],
)
def test_which_process_is_the_command(monkeypatch, argv, typed, command):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert _command._is_command() is command
