"""Runs a comparison: times the steps, trains every row with every seed on several processes, writes the results."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..._files import append_line, write_json
from ..._interrupts import held
from ...errors import DivergedError, FlatminError, FlatminWarning, InvalidArgumentError, OutputError
from ..methods import METHODS
from ..problems.checked import shifted
from ..problems.load import load_problem
from ..recipe import Recipe, Run
from ..results import LEAST_SEEDS, METRICS, RESULTS, RUNS, Row, run_name
from ..results.values import is_diverged
from ..runs.after import write_after
from ..runs.present import identity
from ..runs.record import command_line, environment
from ..runs.run import read_experiment, train_run, write_config
from ..runs.saved import open_saved
from ..training.device import resolve_device
from ..training.trainer import Trainer
from .outcome import Outcome
from .timing import measure_rows
from .workers import Check, Tick, WorkerDiedError, Workers


class Comparison:
    """Runs a comparison, on several processes, and keeps it on disk.

    Args:
        recipe: What the methods share.
        rows: From `make_rows`.
        folder: Where it is kept: ``config.json``, ``results.json`` and a run folder for each row and seed.
        seeds: How many seeds; None for as many as fit in ``minutes``, at least 5.
        first_seed: The first of them.
        timed: Whether to measure the steps.
        after: Whether to measure what is left of each network after training, see `write_after`.
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
        after: bool = False,
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
        self.after = after
        self.minutes = minutes
        cores = _cores()
        self.jobs = jobs or (cores if resolve_device(recipe.device).type == "cpu" else 1)
        self.threads = max(min(cores // self.jobs, torch.get_num_threads()), 1)  # OMP_NUM_THREADS is a limit here too
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
            **({"after": True} if self.after else {}),
        }
        write_config(self.folder, config, read_experiment(outcome.recipe))
        made = identity(self.folder)
        try:
            if self.timed:
                self._measure()
            else:
                self._try()
            self._train_all(started + 0.95 * 60 * self.minutes)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            if identity(self.folder) != made:
                raise OutputError(
                    f"{self.folder}: the folder was removed or moved while the comparison ran, so it ends; what was "
                    "written of its runs has gone with it"
                )
            write_json(
                self.folder / RESULTS,
                {"command": command_line(), **environment(), **outcome.result().to_json()},
            )
        self._warn_of_removed()
        return outcome

    def _warn_of_removed(self) -> None:
        done = [(row, seed) for row in self.outcome.rows for seed in self.outcome.metrics.get(row.label, {})]
        gone = [found.name for row, seed in done if not (found := self.run_folder(row, seed)).exists()]
        if gone:
            warnings.warn(
                f"removed while the comparison ran: {', '.join(gone)}; their results are kept in "
                f"{self.folder / RESULTS}, but not their epochs and checkpoints",
                FlatminWarning,
                stacklevel=3,
            )

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
            if self.after:
                shifted(problem, base.first_batch()[1])  # says now if there is no shifted set
            costs, trainers = measure_rows(
                rows,
                lambda row: Trainer(Run(recipe, row.method, row.settings), problem),
                base.first_batch(),
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
        planned = self.seeds or LEAST_SEEDS
        rows, epochs = self.outcome.rows, self.outcome.recipe.epochs
        started, done = time.monotonic(), 0
        workers = Workers(_train_one, self.jobs, self.threads)
        with held() as signals:  # Ctrl-C acts where it is asked for, and leaves no process behind
            try:
                for number in range(planned):
                    self._submit(workers, number)
                while workers.unfinished:
                    done += workers.wait(0.2)
                    self._collect(workers)
                    complete = len(self.outcome.seeds)
                    self._tell(done, planned * len(rows) * epochs, f"{complete} of {planned} seeds done")
                    signals.check()
                    runs = done / epochs
                    if self.seeds is None and workers.unfinished <= self.jobs and runs > 0:
                        now = time.monotonic()
                        if now + (now - started) / runs * (workers.unfinished + len(rows)) < deadline:
                            self._submit(workers, planned)
                            planned += 1
            except WorkerDiedError as error:
                raise FlatminError(
                    "a run was killed, perhaps because memory ran out: try --jobs 1; finished runs are in "
                    f"{self.folder}"
                ) from error
            finally:
                workers.stop(hurry=lambda: signals.noted)
                self._collect(workers)

    def _submit(self, workers: Workers, number: int) -> None:
        for row in self.outcome.rows:
            seed = self.first_seed + number
            run = Run(self.outcome.recipe, row.method, row.settings, seed)
            workers.submit((row.label, seed), run, self.run_folder(row, seed), self.after)

    def _collect(self, workers: Workers) -> None:
        for (label, seed), metrics in workers.results.items():
            self.outcome.metrics.setdefault(label, {})[seed] = metrics


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_one(run: Run, folder: Path, after: bool, tick: Tick, check: Check) -> dict[str, float]:
    """Trains a run in a process of its own, and measures what is left of its network after training if wanted."""
    check()
    try:
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error
    # Not durable: many short epochs would spend their time waiting for the disk.
    try:
        metrics = train_run(run, folder, on_epoch=lambda metrics: tick(1), on_step=check, durable=False)
        if not after or is_diverged(metrics):
            return metrics
        return metrics | write_after(open_saved(folder, trust_experiment=True), on_step=check)  # its own
    except DivergedError as error:  # a result like that of a run that diverges later: the others go on
        append_line(folder / METRICS, error.metrics)
        tick(run.recipe.epochs)
        return error.metrics
    except InvalidArgumentError as error:
        if run.method in METHODS:
            raise
        raise InvalidArgumentError(  # the process that compares knows it, and has said so
            f"method {run.method!r} is not known in the processes that train: register it in the experiment file, "
            'or at the top level of the script, not under if __name__ == "__main__":'
        ) from error
