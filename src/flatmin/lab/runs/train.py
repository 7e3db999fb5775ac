"""Train one network and keep the run in a folder; continue one."""

import dataclasses
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ... import _distributed
from ..._checks import Bounds
from ..._files import read_text
from ...errors import FlatminWarning
from ..methods import get_method, resolve_settings
from ..methods.private import check_privacy
from ..problems.load import import_experiment
from ..recipe import SEED, Recipe, Run, as_recipe
from ..results import LAST, METRICS
from ..results.files import check_path
from ..results.values import is_diverged
from ..training import torchrun
from .folder import run_folder
from .resume import find_run, read_run
from .run import resume_run, train_run

CHECKPOINT_MINUTES = Bounds(least=0, most=525_600)  # a year
OnEpoch = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainedRun:
    """A run that is finished.

    Attributes:
        folder: Where it is kept.
        metrics: Of the last epoch: ``test_accuracy`` (a share of 1), ``test_loss``, ``train_loss`` and so on, as in
            ``metrics.jsonl``; with ``extra_bytes`` and ``mean_closure_calls`` of the whole run.
        run: What was trained.
    """

    folder: Path
    metrics: Mapping[str, float]
    run: Run

    def __str__(self) -> str:
        accuracy = f"{100 * self.metrics['test_accuracy']:.2f} %"
        if is_diverged(self.metrics):
            accuracy = f"{accuracy}, for it has diverged (test loss {self.metrics['test_loss']})"
        return f"test accuracy after the last epoch {accuracy}; the run is in {self.folder}"


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C, or a plain kill of the command; the message says what is kept and how to go on."""


def train(
    recipe: "Recipe | str | PathLike[str] | None" = None,
    *,
    method: str = "saf",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: "str | PathLike[str] | None" = None,
    checkpoint_minutes: float = 10.0,
    on_epoch: OnEpoch | None = None,
) -> TrainedRun:
    """Trains one network with one method and keeps the run in a folder, as ``flatmin train`` does.

    The folder receives ``config.json``, ``metrics.jsonl`` (one line an epoch) and checkpoints, from which `resume`
    continues after a crash. Under ``torchrun``, call it on every process: the batch size is that of all together.

    Args:
        recipe: What is trained and how: a `Recipe`, or the path of an experiment file, which defines ``model()``,
            ``train_set()`` and ``test_set()``. None trains a small network on digits.
        method: Name of the method.
        settings: Hyperparameters of the method that differ from its defaults.
        seed: Draws the split, the initial weights, the order of the batches and the augmentation.
        out: Folder of the run, new or empty; None for a new one under ``runs/``.
        checkpoint_minutes: Within an epoch, write a checkpoint when the last one is this old; 0: after every step.
        on_epoch: Called with each epoch's metrics.

    Returns:
        The metrics of the last epoch and the folder.

    Raises:
        FlatminError: If an argument, the data, the network or the experiment file cannot be used, or the folder cannot
            be written.
        RunInterrupted: After Ctrl-C; the message says how to go on.

    Example:
        >>> import tempfile
        >>> from flatmin import lab
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = lab.train(lab.Recipe(epochs=1), method="base", out=folder)
        >>> 0 < done.metrics["test_accuracy"] < 1
        True
    """
    recipe = as_recipe(recipe)
    SEED.check("seed", seed)
    CHECKPOINT_MINUTES.check("checkpoint_minutes", checkpoint_minutes)
    if out is not None:
        check_path("out", out)
    import_experiment(recipe)  # which may register the method
    chosen = resolve_settings(get_method(method), settings or {}, epochs=recipe.epochs)
    check_privacy(method, get_method(method), chosen, private=recipe.private is not None)
    run = Run(recipe, method, chosen, seed)
    with _interruptible(run) as here, torchrun.joined(recipe.device):
        # The first rank makes the folder and alone writes into it.
        own = run_folder(out, f"{method}-seed{seed}") if torchrun.rank() == 0 else nullcontext(Path())
        with own as made:
            here.folder = Path(_distributed.from_first(str(made)))
            warn_if_idle(method, run.settings, recipe.epochs)
            said = _saying_divergence(run, on_epoch)
            last = train_run(run, here.folder, on_epoch=said, checkpoint_minutes=checkpoint_minutes)
        return TrainedRun(here.folder, last, run)


def resume(
    run: "str | PathLike[str]",
    *,
    device: str | None = None,
    workers: int | None = None,
    checkpoint_minutes: float = 10.0,
    trust_experiment: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainedRun:
    """Continues a run that was ended early, with its own recipe, method and seed.

    On the CPU, with the same torch and as many processes and workers, the result is bit-identical to that of a run that
    was never ended. A run that is finished is left as it is.

    Args:
        run: Folder of the run, for its newest checkpoint, or one of its checkpoints.
        device: Where to go on; None: where it was.
        workers: Processes that load data; None: as before.
        checkpoint_minutes: As for `train`.
        trust_experiment: Whether an experiment file that lies in the run's folder may be run.
        on_epoch: Called with the metrics of each epoch that was still to do.

    Returns:
        The metrics of the last epoch and the folder.

    Raises:
        DataError: If there is no run, or the checkpoint is damaged; the message names the others.
        FlatminError: If something else cannot be used, or another process is writing the run.
        RunInterrupted: After Ctrl-C; the message says how to go on.
    """
    CHECKPOINT_MINUTES.check("checkpoint_minutes", checkpoint_minutes)
    folder, checkpoint = find_run(check_path("run", run))
    found = read_run(folder, trust_experiment=trust_experiment)
    recipe = dataclasses.replace(
        found.recipe,
        device=found.recipe.device if device is None else device,
        workers=found.recipe.workers if workers is None else workers,
    )
    found = dataclasses.replace(found, recipe=recipe)
    with _interruptible(found, folder), torchrun.joined(found.recipe.device):
        said = _saying_divergence(found, on_epoch)
        last = resume_run(found, folder, checkpoint, on_epoch=said, checkpoint_minutes=checkpoint_minutes)
        return TrainedRun(folder, last, found)


def warn_if_idle(label: str, settings: Mapping[str, Any], epochs: int) -> None:
    """Warns of a method whose loss would begin only after the last epoch."""
    first = max(settings.get("start_epoch", 0), settings.get("lag", 0))
    if first >= epochs:
        warnings.warn(
            f"{label}: the trajectory loss would begin in epoch {first}, counted from 0, but there are only {epochs} "
            "epochs, so it never acts: train longer, or lower start_epoch and lag",
            FlatminWarning,
            stacklevel=3,
        )


def _saying_divergence(run: Run, on_epoch: OnEpoch | None) -> OnEpoch:
    """Warns after the first epoch whose test loss is not finite, then calls ``on_epoch``."""
    told = False

    def epoch_done(metrics: dict[str, float]) -> None:
        nonlocal told
        if is_diverged(metrics) and not told and _distributed.rank() == 0:
            told = True
            warnings.warn(
                f"the training has diverged: the test loss is {metrics['test_loss']} after epoch "
                f"{int(metrics['epoch']) + 1} of {run.recipe.epochs}, and a sample whose outputs are not finite "
                "does not count as right; lower the learning rate, or the method's rho or coefficient",
                FlatminWarning,
                stacklevel=2,
            )
        if on_epoch is not None:
            on_epoch(metrics)

    return epoch_done


@contextmanager
def _interruptible(run: Run, folder: Path | None = None) -> Iterator[SimpleNamespace]:
    """Says after Ctrl-C what was kept, and how to go on; gives the ``folder``, for one that is still to be made."""
    here = SimpleNamespace(folder=folder)
    try:
        yield here
    except KeyboardInterrupt:
        folder = here.folder
        if folder is None or not (folder / LAST).exists():
            raise RunInterrupted("no epoch was done") from None
        metrics = folder / METRICS
        done = len(read_text(metrics).splitlines()) if metrics.exists() else 0
        raise RunInterrupted(
            f"{done} of {run.recipe.epochs} epochs are kept in {folder}; "
            f"to go on: flatmin train --resume {shlex.quote(str(folder))}"
        ) from None
