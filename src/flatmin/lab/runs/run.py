"""One run from start to end: trained, kept on disk as it goes, continued after a crash."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ... import _distributed
from ..._files import LARGEST_SETUP, locked, read_bytes, write_json, write_whole
from ..._interrupts import held
from ...errors import DataError, ExperimentError
from ..problems.load import load_problem
from ..recipe import Recipe, Run
from ..results import CONFIG, EXPERIMENT, METRICS
from ..training import torchrun
from ..training.trainer import Trainer
from .experiment_file import DIGEST, digest_of
from .record import command_line, environment
from .resume import open_start
from .writer import RunWriter, restore_files

OnEpoch = Callable[[dict[str, float]], None]


def train_run(
    run: Run,
    folder: Path,
    *,
    on_epoch: OnEpoch | None = None,
    on_step: Callable[[], None] | None = None,
    checkpoint_minutes: float = 10.0,
    durable: bool = True,
) -> dict[str, float]:
    """Trains as ``run`` says and keeps everything in ``folder``, which exists and is empty.

    ``config.json`` and a copy of the experiment file are written before training begins. After each epoch follow a line
    of ``metrics.jsonl`` and ``checkpoints/last``. The checkpoint before it becomes ``checkpoints/previous``; the best
    one by test accuracy is ``checkpoints/best``.

    Args:
        run: What to train.
        folder: Where to keep it.
        on_epoch: Called with the metrics of each epoch once they are on disk.
        on_step: Called after each step; an exception that it raises ends the training.
        checkpoint_minutes: Within an epoch, write a checkpoint when the last one is this old; 0: after every step.
        durable: Whether checkpoints also survive a power failure, not only the end of the process.

    Returns:
        The metrics of the last epoch (see `Trainer.train_epoch`), with ``extra_bytes`` and ``mean_closure_calls``, the
        closure calls of a step, averaged over the run.

    Raises:
        FlatminError: If something in the run cannot be used, or the folder cannot be written.
    """
    with _alone(folder):
        experiment = read_experiment(run.recipe)  # as it is now, when it is run; reading the data may take long
        trainer = Trainer(run, load_problem(run.recipe, run.seed))
        if _distributed.rank() == 0:
            write_config(folder, run.to_json(), experiment)
        writer = RunWriter(folder, run, trainer, minutes=checkpoint_minutes, durable=durable)
        return _train(writer, on_epoch, on_step)


def resume_run(
    run: Run,
    folder: Path,
    checkpoint: Path | None = None,
    *,
    on_epoch: OnEpoch | None = None,
    on_step: Callable[[], None] | None = None,
    checkpoint_minutes: float = 10.0,
    durable: bool = True,
) -> dict[str, float]:
    """Continues what `train_run` began in ``folder``, as if it had never been ended.

    On the CPU, with as many processes and workers, the result is bit-identical, unless the data set keeps a random
    state itself. A run without any checkpoint starts from the beginning; a finished run is left as it is.

    Args:
        run: From `read_run`; device and number of workers may differ.
        folder: The run's.
        checkpoint: One of its checkpoints; None for the newest.
        on_epoch: As for `train_run`.
        on_step: As for `train_run`.
        checkpoint_minutes: As for `train_run`.
        durable: As for `train_run`.

    Returns:
        As `train_run`.

    Raises:
        FlatminError: As for `train_run`, and if the checkpoint is damaged or does not fit, or another process writes
            the run.
    """
    with _alone(folder):
        with torchrun.first_before_others():
            start = open_start(folder, checkpoint, run)
        if start is not None and start.state["epoch"] == run.recipe.epochs:
            if _distributed.rank() == 0:
                restore_files(folder, start)
            return _conclusion(start.state["metrics"], start.state["extra_bytes"])
        trainer = Trainer(run, load_problem(run.recipe, run.seed))
        writer = RunWriter(folder, run, trainer, minutes=checkpoint_minutes, durable=durable)
        if start is not None:
            writer.restore(start)
        elif _distributed.rank() == 0:
            (folder / METRICS).unlink(missing_ok=True)  # of epochs that are trained again
        del start  # its tensors are a second copy of everything
        return _train(writer, on_epoch, on_step)


def _train(writer: RunWriter, on_epoch: OnEpoch | None, on_step: Callable[[], None] | None) -> dict[str, float]:
    trainer = writer.trainer

    def step_done() -> None:
        writer.step_done()
        if on_step is not None:
            on_step()

    while trainer.epoch < writer.run.recipe.epochs:
        metrics = trainer.train_epoch(step_done)
        writer.epoch_done(metrics)
        if on_epoch is not None:
            on_epoch(metrics)
    return _conclusion(writer.metrics, trainer.extra_bytes)


def _conclusion(metrics: list[dict[str, float]], extra_bytes: int) -> dict[str, float]:
    calls = math.fsum(epoch["closure_calls"] for epoch in metrics) / len(metrics)
    return {**metrics[-1], "extra_bytes": extra_bytes, "mean_closure_calls": calls}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the folder; only the first rank writes, so only it takes the lock."""
    with ExitStack() as lock:
        if _distributed.rank() == 0:
            with held():
                lock.enter_context(locked(folder))
        yield


def read_experiment(recipe: Recipe) -> bytes | None:
    """Returns the content of the recipe's experiment file, if it has one.

    Raises:
        ExperimentError: If there is no such file, or it is none.
    """
    if recipe.experiment is None:
        return None
    try:
        return read_bytes(Path(recipe.experiment), most=LARGEST_SETUP, follow=True)
    except DataError as error:
        raise ExperimentError(str(error)) from error


def write_config(folder: Path, values: dict[str, Any], experiment: bytes | None) -> None:
    """Writes ``config.json``: ``values``, the command, versions and hardware; the experiment file beside it."""
    digest = {}
    if experiment is not None:
        write_whole(folder / EXPERIMENT, experiment)
        digest = {DIGEST: digest_of(experiment)}
    write_json(folder / CONFIG, {"command": command_line(), **values, **digest, **environment()})
