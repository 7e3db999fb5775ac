"""Runs a comparison: times the steps, trains every row with every seed on several processes, writes the results."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..._files import write_json
from ..._interrupts import held
from ...errors import FlatminError, InvalidArgumentError
from ...indices import with_indices
from ..methods import METHODS
from ..problems.load import load_problem
from ..problems.problem import class_numbers
from ..recipe import Recipe, Run
from ..results import LEAST_SEEDS, RESULTS, RUNS, Row, run_name
from ..runs.record import command_line, environment
from ..runs.run import read_experiment, train_run, write_config
from ..training.device import resolve_device
from ..training.trainer import Trainer
from .outcome import Outcome
from .timing import measure_rows


class Comparison:
    """Runs a comparison, on several processes, and keeps it on disk.

    Args:
        recipe: What the methods share.
        rows: From `make_rows`.
        folder: Where it is kept: ``config.json``, ``results.json`` and a run folder for each row and seed.
        seeds: How many seeds; None for as many as fit in ``minutes``, at least 5.
        first_seed: The first of them.
        timed: Whether to measure the steps.
        selection: How the rows were chosen among candidates, if they were (see `select`); written to the results.
        minutes: Time for all, where ``seeds`` is None.
        jobs: Number of processes; None: one a core on the CPU, one on an accelerator.
        on_progress: Called from time to time with epochs done, epochs planned and a word on what is going on.

    Raises:
        FlatminError: If something in it cannot be used; this is noticed before the first run.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Sequence[Row],
        folder: Path,
        *,
        seeds: int | None = None,
        first_seed: int = 0,
        timed: bool = True,
        selection: dict[str, Any] | None = None,
        minutes: float = 3.0,
        jobs: int | None = None,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.outcome = Outcome(recipe, rows, selection=selection)
        self.folder = folder
        self.seeds = seeds
        self.first_seed = first_seed
        self.timed = timed
        self.minutes = minutes
        cores = _cores()
        self.jobs = jobs or (cores if resolve_device(recipe.device).type == "cpu" else 1)
        self.threads = max(cores // self.jobs, 1)
        self._tell = on_progress or (lambda done, planned, word: None)

    def run_folder(self, row: Row, seed: int) -> Path:
        """The folder of one of its runs."""
        return self.folder / RUNS / run_name(row.label, seed)

    def run(self) -> Outcome:
        """Measures the steps, trains every row with every seed, writes ``results.json``.

        After Ctrl-C it keeps what is done; `Outcome.interrupted` says so.
        """
        started = time.monotonic()
        outcome = self.outcome
        config = {
            "rows": [row.setting_json() for row in outcome.rows],
            "recipe": asdict(outcome.recipe),
            "seeds": self.seeds,
            "minutes": self.minutes,
            "jobs": self.jobs,
        }
        write_config(self.folder, config, read_experiment(outcome.recipe))
        try:
            if self.timed:
                self._measure()
            else:
                self._try()
            self._train_all(started + 0.95 * 60 * self.minutes)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            write_json(
                self.folder / RESULTS,
                {"command": command_line(), **environment(), **outcome.result().to_json()},
            )
        return outcome

    def _measure(self) -> None:
        """Builds every row once, so that mistakes show now, and times the steps of all."""
        recipe, rows = self.outcome.recipe, self.outcome.rows
        self._tell(0, 0, "timing the steps")
        problem = load_problem(recipe, seed=0)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            base = Trainer(Run(recipe, rows[0].method, rows[0].settings), problem)
            device = base.device
            index, (x, y) = next(iter(with_indices(base.loader)))
            y = class_numbers(y, problem.num_classes)
            costs, trainers = measure_rows(
                rows,
                lambda row: Trainer(Run(recipe, row.method, row.settings), problem),
                (index, x.to(device), y.to(device)),
                seconds=4.0 * self.minutes,
                on_round=lambda number: self._tell(0, 0, "timing the steps"),
            )
        finally:
            torch.set_num_threads(threads)
        for row, trainer, cost in zip(rows, trainers, costs, strict=True):
            self.outcome.step_ratio[row.label] = cost.full.ratio(costs[0].full)
            self.outcome.step_seconds[row.label] = cost.full.median()
            if cost.plain is not None:
                self.outcome.plain_ratio[row.label] = cost.plain.ratio(costs[0].full)
            self.outcome.extra_bytes[row.label] = trainer.extra_bytes
        if device.type == "cuda":  # what was measured here leaves room for the process that trains
            del base, trainers, trainer
            torch.cuda.empty_cache()

    def _try(self) -> None:
        """Builds every row once, so that mistakes show now."""
        problem = load_problem(self.outcome.recipe, seed=self.first_seed)
        for row in self.outcome.rows:
            Trainer(Run(self.outcome.recipe, row.method, row.settings), problem)

    def _train_all(self, deadline: float) -> None:
        """Trains seed by seed, all rows of one before the next; adds seeds while there is time for another."""
        context = multiprocessing.get_context("spawn")
        ticks, stop = context.SimpleQueue(), context.Event()
        planned = self.seeds or LEAST_SEEDS
        rows, epochs = self.outcome.rows, self.outcome.recipe.epochs
        started, done = time.monotonic(), 0
        workers = ProcessPoolExecutor(self.jobs, context, _start_worker, (ticks, stop, self.threads))
        # Ctrl-C in the middle of `wait`, which takes a lock of each run's, would leave the pool locked for ever.
        with held() as signals, workers as pool:
            futures: dict[Future[dict[str, float]], tuple[Row, int]] = {}
            try:
                for number in range(planned):
                    futures.update(self._submit(pool, number))
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not ticks.empty():
                        done += ticks.get()
                    for future in finished:
                        row, seed = futures[future]
                        self.outcome.metrics.setdefault(row.label, {})[seed] = future.result()
                    complete = len(self.outcome.seeds)
                    self._tell(done, planned * len(rows) * epochs, f"{complete} of {planned} seeds done")
                    signals.check()
                    runs = done / epochs
                    if self.seeds is None and len(waiting) <= self.jobs and runs > 0:
                        now = time.monotonic()
                        if now + (now - started) / runs * (len(waiting) + len(rows)) < deadline:
                            more = self._submit(pool, planned)
                            futures.update(more)
                            waiting |= set(more)
                            planned += 1
            except BaseException as error:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._collect(futures)
                if isinstance(error, BrokenProcessPool):
                    raise FlatminError(
                        "a run was killed, perhaps because memory ran out: try --jobs 1; finished runs are in "
                        f"{self.folder}"
                    ) from error
                raise

    def _submit(self, pool: ProcessPoolExecutor, number: int) -> dict[Future[dict[str, float]], tuple[Row, int]]:
        submitted = {}
        for row in self.outcome.rows:
            seed = self.first_seed + number
            run = Run(self.outcome.recipe, row.method, row.settings, seed)
            with _interrupts_blocked():  # in the process that this starts too, if it does
                submitted[pool.submit(_train_one, run, self.run_folder(row, seed))] = (row, seed)
        return submitted

    def _collect(self, futures: "Mapping[Future[dict[str, float]], tuple[Row, int]]") -> None:
        """Keeps what was done when something ended the comparison early."""
        for future, (row, seed) in futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self.outcome.metrics.setdefault(row.label, {})[seed] = future.result()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keeps Ctrl-C from this thread, and for good from the processes that it starts; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):  # noqa: N818 - not an error
    """Raised in a worker's step when the comparison has been ended."""


_ticks: Any = None
_stop: Any = None


def _start_worker(ticks: Any, stop: Any, threads: int) -> None:
    global _ticks, _stop
    _ticks, _stop = ticks, stop
    # Ctrl-C reaches every process of the terminal; only the main one acts on it, and tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _train_one(run: Run, folder: Path) -> dict[str, float]:
    def check() -> None:
        if _stop.is_set():
            raise _Stopped

    check()
    folder.mkdir(parents=True)
    # Not durable: many short epochs would spend their time waiting for the disk.
    try:
        return train_run(run, folder, on_epoch=lambda metrics: _ticks.put(1), on_step=check, durable=False)
    except InvalidArgumentError as error:
        if run.method in METHODS:
            raise
        raise InvalidArgumentError(  # the process that compares knows it, and has said so
            f"method {run.method!r} is not known in the processes that train: register it in the experiment file, "
            'or at the top level of the script, not under if __name__ == "__main__":'
        ) from error
