"""One run from start to end, kept on disk as it goes."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .checkpoint import save_checkpoint
from .config import Run
from .load import load_problem
from .record import CONFIG, append_line, command_line, environment, write_json
from .trainer import Trainer

OnEpoch = Callable[[dict[str, float]], None]


def train(
    run: Run,
    folder: Path,
    *,
    on_epoch: OnEpoch | None = None,
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Trains as ``run`` says and keeps everything in ``folder``, which exists and is empty.

    It receives ``config.json`` before training begins, a line of ``metrics.jsonl`` and ``checkpoints/last`` after each
    epoch, and ``checkpoints/best`` (of the highest test accuracy) when there is a better one. An experiment file is
    copied beside them.

    Args:
        run: What to train.
        folder: Where to keep it.
        on_epoch: Called with each epoch's metrics once they are on disk.
        on_step: Called after each step; what it raises ends the training.

    Returns:
        The last epoch's metrics (see `Trainer.train_epoch`) and ``extra_bytes``.

    Raises:
        FlatminError: If something that the run names cannot be used, or the folder cannot be written.
    """
    trainer = Trainer(run, load_problem(run.recipe, run.seed))
    write_config(folder, run.to_json(), run.recipe.experiment)
    best, metrics = -math.inf, {}
    for _ in range(run.recipe.epochs):
        metrics = trainer.train_epoch(on_step)
        state = trainer.state_dict()
        save_checkpoint(folder / "checkpoints" / "last", state)
        if metrics["test_accuracy"] > best:
            best = metrics["test_accuracy"]
            save_checkpoint(folder / "checkpoints" / "best", state)
        append_line(folder / "metrics.jsonl", metrics)
        if on_epoch is not None:
            on_epoch(metrics)
    return {**metrics, "extra_bytes": trainer.extra_bytes}


def write_config(folder: Path, values: dict[str, Any], experiment: str | None) -> None:
    """Writes ``config.json``: ``values``, the command, versions and hardware; copies the experiment file beside it."""
    write_json(folder / CONFIG, {"command": command_line(), **values, **environment()})
    if experiment is not None:
        try:
            shutil.copy(experiment, folder / "experiment.py")
        except OSError as error:
            raise OutputError(f"{folder}: the experiment file could not be copied there: {error}") from error
