"""Processes that do one job at a time each, and that end when the process that has started them does.

Between it and each of them there is a pipe and nothing else: no lock that one which is killed would keep, and no
semaphore that would outlive them all.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .warned import Found, sent

CONTEXT: Any = multiprocessing.get_context("spawn")  # a process that has used CUDA or threads cannot be forked
GRACE = 5.0  # seconds in which a job may come to its next step once nobody is there who wants its result

Tick = Callable[[int], None]
Check = Callable[[], None]
Keep = Callable[[Any], None]


class WorkerDiedError(Exception):
    """A process was killed in the middle of a job."""


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised in a job when its result is not wanted any more."""


class _TracebackThereError(Exception):
    """The traceback of an error in another process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: "Connection[Any, Any]"
    job: Hashable = None  # the one that it does, by name


class Workers:
    """Calls a function with many arguments, each call in one of several processes.

    They are ended by `stop`, which must be called.

    Args:
        function: Called with the arguments of a job, and then three functions: one to call with a number of ticks that
            are done; one to call often, which raises `Stopped` when the result is not wanted any more; and one to call
            with what is the result if the job does not come to its end.
        jobs: Number of processes.
        threads: Threads of each.

    Attributes:
        results: What the calls have returned, or have kept so far, by the name of the job.
        warned: flatmin's warnings, as they came: the name of the job, text and class.
    """

    def __init__(self, function: Callable[..., Any], jobs: int, threads: int) -> None:
        self.results: dict[Any, Any] = {}
        self.warned: deque[tuple[Any, Found]] = deque()
        self._function, self._jobs, self._threads = function, jobs, threads
        self._waiting: deque[tuple[Hashable, tuple[Any, ...]]] = deque()
        self._workers: list[_Worker] = []
        self._error: BaseException | None = None
        self._ticks = 0

    @property
    def unfinished(self) -> int:
        """Number of jobs that have no result yet."""
        return len(self._waiting) + sum(worker.job is not None for worker in self._workers)

    def submit(self, name: Hashable, *arguments: Any) -> None:
        """Adds a job; jobs are begun in this order."""
        self._waiting.append((name, arguments))
        self._begin()

    def wait(self, seconds: float) -> int:
        """Waits until something has happened and returns the ticks that came.

        Raises:
            WorkerDiedError: If a process has died.
            Exception: What a job has raised.
        """
        self._receive(seconds)
        if self._error is not None:
            raise self._error
        self._begin()
        ticks, self._ticks = self._ticks, 0
        return ticks

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Ends the processes, each at its next step; results that still come are kept.

        Args:
            hurry: Asked from time to time; where it says so, they are ended at once.
        """
        self._waiting.clear()
        for worker in self._workers:
            _send(worker, None)
        while self._workers:
            self._receive(0.2)
            if hurry():
                for worker in self._workers:
                    worker.process.kill()

    def _begin(self) -> None:
        """Gives jobs to processes that have none."""
        while self._waiting:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                if len(self._workers) == self._jobs:
                    return
                idle = self._start()
            idle.job, arguments = self._waiting.popleft()
            _send(idle, arguments)

    def _start(self) -> _Worker:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_work, args=(theirs, self._function, self._threads))
        with _interrupts_blocked():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _receive(self, seconds: float) -> None:
        """Notes what has come; an end of the pipe is that of its process."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(by_pipe), seconds):
            worker = by_pipe[pipe]  # type: ignore[index]  # what comes back is what was given
            try:
                while worker.pipe.poll():
                    self._note(worker, *worker.pipe.recv())
            except (EOFError, OSError):
                worker.process.join(GRACE)
                worker.process.kill()  # if it has not come to its end although all is said
                worker.process.join()
                worker.pipe.close()
                self._workers.remove(worker)
                if worker.job is not None:
                    self._error = self._error or WorkerDiedError()

    def _note(self, worker: _Worker, kind: str, value: Any) -> None:
        if kind == "ticks":
            self._ticks += value
            return
        if kind == "warning":
            self.warned.append((worker.job, value))
            return
        if kind == "kept":
            self.results[worker.job] = value
            return
        job, worker.job = worker.job, None
        if kind == "result":
            self.results[job] = value
        elif self._error is None:
            self._error, where = value
            self._error.__cause__ = _TracebackThereError(where)


def _send(worker: _Worker, message: Any) -> None:
    with suppress(OSError):  # it has died, which `_receive` will notice
        worker.pipe.send(message)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keeps Ctrl-C from this thread, and for good from the processes that it starts; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which starts beside the first process, and unblocks it afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: "Connection[Any, Any]", function: Callable[..., Any], threads: int) -> None:
    """What each process does."""
    # Ctrl-C reaches every process of the terminal; only the main one acts on it, and tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    jobs: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    stopped = threading.Event()
    threading.Thread(target=_listen, args=(pipe, jobs, stopped), daemon=True).start()

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    alone = threading.RLock()  # a warning may come in any thread

    def send(kind: str, value: Any) -> None:
        try:
            with alone:
                pipe.send((kind, value))
        except OSError:  # nobody is there any more
            raise Stopped from None

    with suppress(Stopped), sent(partial(send, "warning")):
        while (arguments := jobs.get()) is not None:
            try:
                tick, keep = partial(send, "ticks"), partial(send, "kept")
                result = function(*arguments, tick, check, keep)
            except Stopped:
                raise
            except BaseException as error:
                send("error", (_sendable(error), traceback.format_exc()))
            else:
                send("result", result)


def _listen(pipe: "Connection[Any, Any]", jobs: "queue.SimpleQueue[Any]", stopped: threading.Event) -> None:
    """Takes in jobs, or that there are no more, until the process that gives them is gone, however it went."""
    with suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            if arguments is None:
                stopped.set()
            jobs.put(arguments)
    stopped.set()
    jobs.put(None)
    time.sleep(GRACE)
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # of a class that only this process knows, or that takes other arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
