"""What a process of a comparison does: it trains one run, and measures it after training."""

from dataclasses import dataclass
from pathlib import Path

from ..._files import append_line, check_folder
from ...errors import DivergedError, InvalidArgumentError, OutputError
from ..methods import METHODS
from ..recipe import Run
from ..results import CONFIG, METRICS
from ..results.values import is_diverged
from ..runs.after import measured_after, write_after
from ..runs.run import resume_run, train_run
from ..runs.saved import open_saved
from ..training.device import release
from .workers import Check, Keep, Tick


@dataclass(frozen=True)
class Job:
    """A run of a comparison, to be trained or, where only that is missing, measured.

    Attributes:
        run: What to train.
        folder: Its own, new or that of the same run, which goes on.
        after: Whether to measure what is left of its network after training.
        trusted: Whether the folder was made by this comparison, so that an experiment file in it is its own.
        known: Its metrics, if it was trained before.
    """

    run: Run
    folder: Path
    after: bool = False
    trusted: bool = True
    known: dict[str, float] | None = None


def train_one(job: Job, tick: Tick, check: Check, keep: Keep) -> dict[str, float]:
    """Trains a run in a process of its own, and measures what is left of its network after training if wanted.

    What was trained is kept before it is measured.
    """
    check()
    release()  # the run that this process has trained before
    run, folder, ticks = job.run, job.folder, 0

    def epoch_done(metrics: dict[str, float]) -> None:
        nonlocal ticks
        ticks += 1
        tick(1)

    try:
        for each in (folder.parent, folder):
            each.mkdir(exist_ok=True)
            check_folder(each)  # and no link out of the comparison
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error
    train = resume_run if (folder / CONFIG).exists() else train_run
    try:
        # Not durable: many short epochs would spend their time waiting for the disk.
        metrics = train(run, folder, on_epoch=epoch_done, on_step=check, durable=False)
    except DivergedError as error:  # a result like that of a run that diverges later: the others go on
        append_line(folder / METRICS, error.metrics)
        tick(run.recipe.epochs - ticks)
        return error.metrics
    except InvalidArgumentError as error:
        if run.method in METHODS:
            raise
        raise InvalidArgumentError(  # the process that compares knows it, and has said so
            f"method {run.method!r} is not known in the processes that train: register it in the experiment file, "
            'or at the top level of the script, not under if __name__ == "__main__":'
        ) from error
    if job.known is None:
        tick(run.recipe.epochs - ticks)  # those that were done before
    if not job.after or is_diverged(metrics):
        return metrics
    keep(metrics)
    found = measured_after(folder, run.recipe.epochs)
    if found is None:
        found = write_after(open_saved(folder, trust_experiment=job.trusted), on_step=check)
    return metrics | found
