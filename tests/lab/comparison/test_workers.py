"""Processes that do jobs: what they give back, and that none outlives the one that has started it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from flatmin.errors import DataError, NonFiniteGradientWarning
from flatmin.lab.comparison import workers as workers_module
from flatmin.lab.comparison.workers import WorkerDiedError, Workers, _sendable

SPAWN = workers_module.CONTEXT


def job(what, value, tick, check, keep):
    """What the processes of these tests do."""
    if what == "facts":
        tick(3)
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # as it was while torch was imported
        return blocked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN, torch.get_num_threads(), os.getpid()
    if what == "warn":
        warnings.warn(value, NonFiniteGradientWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)
    if what == "raise":
        raise value
    if what.startswith("keep, then "):
        keep("so far")
        what = what.removeprefix("keep, then ")
    if what == "die":
        os.kill(os.getpid(), value)
    if what == "steps":  # for ever
        Path(value).touch()
        while True:
            check()
            time.sleep(0.01)
    if what == "hang":
        Path(value).touch()
        time.sleep(600)
    return value


@pytest.fixture
def workers():
    """Makes workers; at the end none of their processes is there any more."""
    made = []

    def make(jobs=1, threads=1):
        made.append(Workers(job, jobs, threads))
        return made[-1]

    yield make
    for each in made:
        each.stop(hurry=lambda: True)
    assert multiprocessing.active_children() == []


def finish(workers):
    ticks = 0
    while workers.unfinished:
        ticks += workers.wait(0.2)
    return ticks


def until(condition):
    assert any(condition() or time.sleep(0.05) for _ in range(1200))


def test_what_they_give_back_and_how_they_are(workers, tmp_path, monkeypatch):
    """All in one process, since to start one takes seconds, and in one that begins as users' do."""
    monkeypatch.setattr(workers_module, "CONTEXT", SPAWN)
    own = workers(jobs=1, threads=1)
    own.submit("first", "facts", None)
    own.submit("second", "keep, then return", [torch.ones(2), "more"])
    own.submit("third", "facts", None)
    own.submit("loud", "warn", "not finite")
    assert own.unfinished == 4
    assert finish(own) == 6
    assert list(own.warned) == [("loud", ("not finite", NonFiniteGradientWarning))]
    ignores, threads, process = own.results["first"]
    assert (ignores, threads) == (True, 1)
    assert process != os.getpid()
    assert own.results["third"] == own.results["first"]
    assert own.results["second"][1] == "more"
    own.submit("wrong", "raise", DataError("no data"))
    own.submit("next", "return", 1)
    with pytest.raises(DataError, match="no data") as caught:
        finish(own)
    assert "in job" in str(caught.value.__cause__)
    assert "next" not in own.results


def test_they_end_at_the_next_step_and_what_hangs_is_killed_when_asked(workers, tmp_path):
    own = workers(jobs=2)
    own.submit("steps", "steps", tmp_path / "steps")
    own.submit("hang", "keep, then hang", tmp_path / "hang")
    own.submit("never", "steps", tmp_path / "never")
    until(lambda: own.wait(0.1) == 0 and len(list(tmp_path.iterdir())) == 2)
    stepping, hanging = (worker.process for worker in own._workers)
    asked = []

    def hurry():
        asked.append(stepping.is_alive())
        return len(asked) > 3 and not stepping.is_alive()

    own.stop(hurry)
    assert stepping.exitcode == 0
    assert hanging.exitcode == -signal.SIGKILL
    assert not (tmp_path / "never").exists()
    assert own.results == {"hang": "so far"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_one_that_is_killed_is_noticed_and_the_others_results_are_kept(workers, number):
    own = workers(jobs=1)
    own.submit("good", "return", 1)
    own.submit("bad", "keep, then die", number)
    with pytest.raises(WorkerDiedError):
        finish(own)
    assert own.results == {"good": 1, "bad": "so far"}


class LocalError(Exception):
    def __init__(self, a, b):
        super().__init__("cannot be made again from this")


def test_an_error_that_cannot_be_sent_is_sent_as_its_text():
    error = DataError("x")
    assert _sendable(error) is error
    assert str(_sendable(LocalError(1, 2))) == "LocalError: cannot be made again from this"


PARENT = """
import sys, time
sys.path.insert(0, {folder!r})
from test_workers import job
from flatmin.lab.comparison.workers import Workers
if __name__ == "__main__":
    workers = Workers(job, 2, 1)
    workers.submit("a", "steps", "a")
    workers.submit("b", "hang", "b")
    workers.submit("c", "steps", "c")
    while True:
        workers.wait(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_when_what_started_them_is_killed_they_end_and_begin_nothing(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT.format(folder=str(Path(__file__).parent)))
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, start_new_session=True) as process:
        try:
            until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
        finally:
            process.kill()
    until(lambda: not in_session(process.pid))
    assert not (tmp_path / "c").exists()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if str(process.pid) in name}


def in_session(number):
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.append(int(path.parent.name))
    return found
