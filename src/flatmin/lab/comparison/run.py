"""Runs a comparison: times the steps, trains every row with every seed on several processes, writes the results."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..._files import read_json, write_json
from ..._interrupts import held
from ...averages._statistics import keeps_statistics
from ...errors import FlatminError, FlatminWarning, OutputError
from ..problems.checked import shifted
from ..problems.load import load_problem
from ..recipe import Recipe, Run
from ..results import (
    LEAST_SEEDS,
    RESULTS,
    RUNS,
    Row,
    parse_run_name,
    read_comparison,
    run_name,
)
from ..runs.present import identity
from ..runs.record import command_line, environment
from ..runs.run import read_experiment, write_config
from ..training.device import release, resolve_device
from ..training.trainer import Trainer
from .gpu_sharing import side_by_side
from .job import Job, train_one
from .outcome import Outcome, measured
from .timing import measure_rows
from .warned import Warned
from .workers import WorkerDiedError, Workers

MOST_SEEDS = 10_000  # of a comparison

_log = logging.getLogger("flatmin")

# What should be the same for all runs of a comparison, of what is recorded with it.
SAME = {"versions": ("flatmin", "torch"), "hardware": ("processor", "accelerator")}


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
        going_on: Whether it was begun before, in the same folder: what is there is taken, and what is missing done. It
            then adds no seeds to those that it has begun.

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
        going_on: bool = False,
    ) -> None:
        self.outcome = Outcome(recipe, rows, selection=selection)
        self.folder = folder
        self.seeds = seeds
        self.first_seed = first_seed
        self.timed = timed
        self.after = after
        self.going_on = going_on
        self.minutes = minutes
        cores = _cores()
        self.jobs = jobs or (cores if resolve_device(recipe.device).type == "cpu" else 1)
        self.threads = max(min(cores // self.jobs, torch.get_num_threads()), 1)  # OMP_NUM_THREADS is a limit here too
        self._warned = Warned()
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
            **({"selection": outcome.selection} if outcome.selection else {}),
        }
        if self.going_on:
            if (self.folder / RESULTS).exists():
                outcome.take(read_comparison(self.folder))
                self._warn_of_other_versions()
            known = sum(map(len, outcome.metrics.values()))
            _log.info("going on in %s, which has results of %d runs", self.folder, known)
        else:
            write_config(self.folder, config, read_experiment(outcome.recipe))
        made = identity(self.folder)
        try:
            with self._warned.listening():
                if self.timed and not outcome.step_ratio:
                    self._measure()
                else:
                    self._try()
            release()  # what was built here leaves room for the processes that train
            with side_by_side(resolve_device(outcome.recipe.device), self.jobs):
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
        self._warn_of_unmeasured()
        return outcome

    def _warn_of_other_versions(self) -> None:
        """Warns where the runs that are taken were made with other versions, or on another machine."""
        then, now = read_json(self.folder / RESULTS), environment()
        other = []
        for kind, names in SAME.items():
            known: Any = then.get(kind)
            for name in names:
                if isinstance(known, dict) and name in known and known[name] != now[kind].get(name):
                    other.append(f"{name} {known[name]}, now {now[kind].get(name)}")
        if other and self.outcome.metrics:
            warnings.warn(
                f"{self.folder}: its earlier runs were made with {'; '.join(other)}, so numbers of both stand side by "
                "side: to have all alike begin anew, with another folder",
                FlatminWarning,
                stacklevel=4,
            )

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

    def _warn_of_unmeasured(self) -> None:
        left = [run_name(row.label, seed) for row, seed in self.outcome.unmeasured()] if self.after else []
        if left:
            warnings.warn(
                f"trained, but not measured after training: {', '.join(left)}; the same comparison in {self.folder} "
                "goes on with them",
                FlatminWarning,
                stacklevel=3,
            )

    def _warn_of_statistics(self, fresh: Sequence[str]) -> None:
        """Warns where the rows of these labels are evaluated with batch-norm statistics made anew, and others not."""
        selecting = self.first_seed > 0  # among candidates of one method
        if fresh and not (self.outcome.recipe.fresh_statistics or selecting):
            warnings.warn(
                f"evaluated with batch-norm statistics made anew, which {self.outcome.rows[0].label} is not: "
                f"{', '.join(fresh)}; these alone can be a difference: --fresh-statistics gives them to all rows",
                FlatminWarning,
                stacklevel=4,
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
        self._warn_of_statistics([row.label for row, each in zip(rows, trainers, strict=True) if _is_fresh(row, each)])

    def _try(self) -> None:
        """Builds every row once, so that mistakes show now."""
        problem = load_problem(self.outcome.recipe, seed=self.first_seed)
        fresh = []
        for row in self.outcome.rows:
            trainer = Trainer(Run(self.outcome.recipe, row.method, row.settings), problem)
            fresh += [row.label] if _is_fresh(row, trainer) else []
        if self.after:
            shifted(problem, trainer.first_batch()[1])
        self._warn_of_statistics(fresh)

    def _train_all(self, deadline: float) -> None:
        """Trains seed by seed, all rows of one before the next; adds seeds while there is time for another."""
        planned = self.seeds or max(LEAST_SEEDS, self._begun())
        rows, epochs = self.outcome.rows, self.outcome.recipe.epochs
        started = time.monotonic()
        before = done = epochs * sum(map(len, self.outcome.metrics.values()))
        workers = Workers(train_one, self.jobs, self.threads)
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
                    runs = (done - before) / epochs
                    if self.seeds is None and not self.going_on and workers.unfinished <= self.jobs and runs > 0:
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
            known = self.outcome.metrics.get(row.label, {}).get(seed)
            if known is None or (self.after and not measured(known)):
                run = Run(self.outcome.recipe, row.method, row.settings, seed)
                job = Job(run, self.run_folder(row, seed), after=self.after, trusted=not self.going_on, known=known)
                workers.submit((row.label, seed), job)

    def _begun(self) -> int:
        """How many seeds have a run, where it was begun before."""
        home, labels = self.folder / RUNS, [row.label for row in self.outcome.rows]
        runs = [parse_run_name(each.name, labels) for each in home.iterdir()] if home.is_dir() else []
        seeds = [run[1] - self.first_seed for run in runs if run is not None]
        return max((seed + 1 for seed in seeds if seed < MOST_SEEDS), default=0)

    def _collect(self, workers: Workers) -> None:
        for (label, seed), metrics in workers.results.items():
            self.outcome.metrics.setdefault(label, {})[seed] = metrics
        while workers.warned:
            (label, seed), found = workers.warned.popleft()
            self._warned.pass_on(run_name(label, seed), found)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_fresh(row: Row, trainer: Trainer) -> bool:
    """Whether what is evaluated has batch-norm statistics that its method makes anew."""
    made = trainer.trajectory is None and row.settings.get("statistics") == "fresh"
    return made and any(map(keeps_statistics, trainer.model.modules()))
