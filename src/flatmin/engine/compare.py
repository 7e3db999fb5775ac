"""Several methods on the same splits, initial weights and batches, seed by seed."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import with_indices
from ..errors import InvalidArgumentError
from .config import Recipe, Run
from .methods import get_method, resolve_settings
from .problem import load_problem
from .record import command_line, environment, write_json
from .stats import holm, interval, paired_p_value
from .timing import measure_steps
from .train import train, write_config
from .trainer import Trainer, resolve_device

LEAST_SEEDS = 5


@dataclass(frozen=True)
class Row:
    """One row of a comparison: a method with one setting of its hyperparameters."""

    label: str
    method: str
    settings: Mapping[str, Any]


@dataclass
class Outcome:
    """What a comparison has found so far.

    Attributes:
        recipe: What the methods share.
        rows: The methods; the first is the base that the others are compared with.
        metrics: For each row's label, the last epoch's metrics by seed.
        step_ratio: For each label, the median ratio of its step's time to the base's.
        step_seconds: For each label, the median time of a step.
        extra_bytes: For each label, what it keeps in memory beyond the base optimizer.
        interrupted: Whether it was ended before all runs were done.
    """

    recipe: Recipe
    rows: Sequence[Row]
    metrics: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    step_ratio: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def seeds(self) -> list[int]:
        """The seeds that every row has finished."""
        finished = [set(self.metrics.get(row.label, {})) for row in self.rows]
        return sorted(set.intersection(*finished)) if finished else []

    def accuracies(self, label: str) -> list[float]:
        """Test accuracy after the last epoch, in percent, for each of `seeds`."""
        return [100 * self.metrics[label][seed]["test_accuracy"] for seed in self.seeds]

    def table(self) -> list[dict[str, Any]]:
        """One dictionary a row: accuracies, their interval, paired difference to the base, p-value, cost."""
        base = self.accuracies(self.rows[0].label)
        table = []
        for row in self.rows:
            accuracies = self.accuracies(row.label)
            differences = [ours - theirs for ours, theirs in zip(accuracies, base, strict=True)]
            entry: dict[str, Any] = {
                "label": row.label,
                "method": row.method,
                "settings": dict(row.settings),
                "test_accuracy": accuracies,
                "step_ratio": self.step_ratio.get(row.label),
                "step_seconds": self.step_seconds.get(row.label),
                "extra_bytes": self.extra_bytes.get(row.label),
            }
            if accuracies:
                entry["accuracy"] = asdict(interval(accuracies))
                entry["difference"] = asdict(interval(differences))
                entry["p_value"] = paired_p_value(differences)
            table.append(entry)
        if base:
            for entry, adjusted in zip(table[1:], holm([entry["p_value"] for entry in table[1:]]), strict=True):
                entry["p_value_holm"] = adjusted
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything, with every seed's numbers; runs of seeds that not every row has finished come as ``partial``."""
        seeds = self.seeds
        return {
            "recipe": asdict(self.recipe),
            "base": self.rows[0].label,
            "seeds": seeds,
            "interrupted": self.interrupted,
            "rows": self.table(),
            "metrics": {label: {str(seed): by_seed[seed] for seed in seeds} for label, by_seed in self.metrics.items()},
            "partial": {
                label: {str(seed): values for seed, values in by_seed.items() if seed not in seeds}
                for label, by_seed in self.metrics.items()
            },
        }


def make_rows(methods: Sequence[str], settings: Mapping[str, Mapping[str, Sequence[Any]]], *, epochs: int) -> list[Row]:
    """Makes the rows of a comparison: every method in every combination of the settings given for it.

    Args:
        methods: Names from the registry. The first row that stands for ``base`` becomes the base; there must be one.
        settings: For a method, for a hyperparameter, the values to try.
        epochs: Length of the runs, to which some defaults are tied.

    Raises:
        InvalidArgumentError: If a method or hyperparameter is unknown, twice there, or ``base`` is missing.
    """
    if len(set(methods)) != len(methods):
        raise InvalidArgumentError(f"methods names one twice: {', '.join(methods)}; for several settings use --set")
    for name in settings:
        get_method(name)
        if name not in methods:
            raise InvalidArgumentError(
                f"a setting is given for {name}, which is not among the methods {', '.join(methods)}"
            )
    if "base" not in methods:
        raise InvalidArgumentError("methods must include base, with which the others are compared")
    rows = []
    for name in sorted(methods, key=lambda method: method != "base"):  # the base first, the others as they come
        tried = settings.get(name, {})
        for values in itertools.product(*tried.values()):
            given = dict(zip(tried, values, strict=True))
            label = " ".join([name, *(f"{key}={value:.15g}" for key, value in given.items())])
            rows.append(Row(label, name, resolve_settings(get_method(name), given, epochs=epochs)))
    labels = [row.label for row in rows]
    if len(set(labels)) != len(labels):
        raise InvalidArgumentError(f"a setting is given twice: the rows are {', '.join(labels)}")
    return rows


class Comparison:
    """Runs a comparison, on several processes, and keeps it on disk.

    Args:
        recipe: What the methods share.
        rows: From `make_rows`.
        folder: Where it is kept: ``config.json``, ``results.json`` and a run folder for each row and seed.
        seeds: How many seeds; None for as many as fit in ``minutes``, at least 5.
        minutes: Time for all, where ``seeds`` is None.
        jobs: Processes; None for one a core on the CPU and one on an accelerator.
        on_progress: Called from time to time with epochs done, epochs planned and a word on what is going on.

    Raises:
        FlatminError: If something in it cannot be used; found out before the first run.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Sequence[Row],
        folder: Path,
        *,
        seeds: int | None = None,
        minutes: float = 3.0,
        jobs: int | None = None,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.outcome = Outcome(recipe, rows)
        self.folder = folder
        self.seeds = seeds
        self.minutes = minutes
        cores = os.cpu_count() or 1
        self.jobs = jobs or (cores if resolve_device(recipe.device).type == "cpu" else 1)
        self.threads = max(cores // self.jobs, 1)
        self._tell = on_progress or (lambda done, planned, word: None)

    def run(self) -> Outcome:
        """Measures the steps, trains every row with every seed, writes ``results.json``.

        After Ctrl-C it keeps what is done; `Outcome.interrupted` says so.
        """
        started = time.monotonic()
        outcome = self.outcome
        config = {
            "rows": [asdict(row) for row in outcome.rows],
            "recipe": asdict(outcome.recipe),
            "jobs": self.jobs,
        }
        write_config(self.folder, config, outcome.recipe.experiment)
        try:
            self._measure()
            self._train_all(started + 0.95 * 60 * self.minutes)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            write_json(
                self.folder / "results.json",
                {"command": command_line(), **environment(), **outcome.to_json()},
            )
        return outcome

    def _measure(self) -> None:
        """Builds every row once, so that what is wrong with it shows now, and times the steps of all."""
        recipe, rows = self.outcome.recipe, self.outcome.rows
        self._tell(0, 0, "timing the steps")
        problem = load_problem(recipe, seed=0)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            trainers = [Trainer(Run(recipe, row.method, row.settings), problem) for row in rows]
            device = trainers[0].device
            index, (x, y) = next(iter(with_indices(trainers[0].loader)))
            times = measure_steps(
                trainers,
                (index, x.to(device), y.to(device)),
                seconds=4.0 * self.minutes,
                on_round=lambda number: self._tell(0, 0, "timing the steps"),
            )
        finally:
            torch.set_num_threads(threads)
        for row, trainer, each in zip(rows, trainers, times, strict=True):
            self.outcome.step_ratio[row.label] = each.ratio(times[0])
            self.outcome.step_seconds[row.label] = each.median()
            self.outcome.extra_bytes[row.label] = trainer.extra_bytes

    def _train_all(self, deadline: float) -> None:
        """Trains seed by seed, all rows of one before the next; adds seeds while there is time for another."""
        context = multiprocessing.get_context("spawn")
        ticks, stop = context.SimpleQueue(), context.Event()
        planned = self.seeds or LEAST_SEEDS
        rows, epochs = self.outcome.rows, self.outcome.recipe.epochs
        started, done = time.monotonic(), 0
        with ProcessPoolExecutor(self.jobs, context, _start_worker, (ticks, stop, self.threads)) as pool:
            futures: dict[Future[dict[str, float]], tuple[Row, int]] = {}
            try:
                with _interrupts_ignored():  # inherited by the processes that this starts
                    for seed in range(planned):
                        futures.update(self._submit(pool, seed))
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
                    runs = done / epochs
                    if self.seeds is None and len(waiting) <= self.jobs and runs > 0:
                        now = time.monotonic()
                        if now + (now - started) / runs * (len(waiting) + len(rows)) < deadline:
                            more = self._submit(pool, planned)
                            futures.update(more)
                            waiting |= set(more)
                            planned += 1
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._collect(futures)
                raise

    def _submit(self, pool: ProcessPoolExecutor, seed: int) -> dict[Future[dict[str, float]], tuple[Row, int]]:
        submitted = {}
        for row in self.outcome.rows:
            run = Run(self.outcome.recipe, row.method, row.settings, seed)
            folder = self.folder / "runs" / f"{row.label.replace(' ', '-')}-seed{seed}"
            submitted[pool.submit(_train_one, run, folder)] = (row, seed)
        return submitted

    def _collect(self, futures: "Mapping[Future[dict[str, float]], tuple[Row, int]]") -> None:
        """Keeps what was done when something ended the comparison early."""
        for future, (row, seed) in futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self.outcome.metrics.setdefault(row.label, {})[seed] = future.result()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignores Ctrl-C for a moment, where that can be said: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    return train(run, folder, on_epoch=lambda metrics: _ticks.put(1), on_step=check)


def verdict(outcome: Outcome) -> str:
    """Says in plain words which methods are better than the base beyond noise, and at what cost.

    A method counts as better or worse if its paired difference is significant at 5 %, two-sided, after Holm's
    correction for the number of methods compared.
    """
    table = outcome.table()
    count = len(outcome.seeds)
    others = table[1:]
    if not others or count < 2:
        return f"{count} finished seed{'s' if count != 1 else ''}: no interval, so no claim; more seeds are needed."
    better: list[str] = []
    worse: list[str] = []
    open_: list[str] = []
    for entry in others:
        significant = entry["p_value_holm"] < 0.05
        mean = entry["difference"]["mean"]
        text = f"{entry['label']} ({mean:+.2f} points"
        if entry["step_ratio"] is not None:
            text += f" at {entry['step_ratio']:.2f} times the step"
        (better if significant and mean > 0 else worse if significant else open_).append(text + ")")
    sentences = [f"Better than {table[0]['label']} beyond noise here: {', '.join(better) or 'none'}."]
    if worse:
        sentences.append(f"Worse: {', '.join(worse)}.")
    if open_:
        sentences.append(f"Not told apart from it: {', '.join(open_)}.")
    sentences.append(
        f"(Paired over {count} seeds, two-sided t-test at 5 %, Holm-corrected for {len(others)} "
        f"comparison{'s' if len(others) != 1 else ''}; this data, network and recipe only.)"
    )
    return " ".join(sentences)
