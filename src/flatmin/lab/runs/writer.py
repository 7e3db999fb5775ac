"""Writes what a run leaves on disk as it goes: checkpoints and metrics."""

import errno
import shlex
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import _distributed
from ..._files import append_line, read_bytes, write_lines
from ..._interrupts import held
from ...errors import DataError, FlatminError, FlatminWarning, OutputError
from ..recipe import Run
from ..results import BEST, LAST, METRICS, PREVIOUS
from ..training.trainer import Trainer
from .checkpoint import STATE, copy_checkpoint, save_checkpoint
from .present import Present
from .resume import Start, describe_difference

ASK_EVERY = 10  # steps


class RunWriter:
    """Writes a run's checkpoints and metrics, on the first rank.

    ``checkpoints/last`` is the newest, ``checkpoints/previous`` the one before it, and ``checkpoints/best`` that of the
    first epoch with the highest test accuracy. Each holds the metrics of all epochs before it, so ``metrics.jsonl`` can
    be restored from it.

    Args:
        folder: The run's.
        run: The run that is trained.
        trainer: Its trainer.
        minutes: Longest time within an epoch without a checkpoint.
        durable: See `save_checkpoint`.
    """

    def __init__(self, folder: Path, run: Run, trainer: Trainer, *, minutes: float, durable: bool = True) -> None:
        self.folder = folder
        self.run = run
        self.trainer = trainer
        self.minutes = minutes
        self.durable = durable
        self.metrics: list[dict[str, float]] = []
        self._files = Present(folder)
        self._start = folder / LAST
        self._last_is_good = True
        self._saved = time.monotonic()

    def gather(self) -> dict[str, Any]:
        """Returns everything that is needed to continue the run."""
        return {
            "run": self.run.to_json(),
            "data": self.trainer.problem.sizes(),
            "metrics": self.metrics,
            "extra_bytes": self.trainer.extra_bytes,
            **self.trainer.state_dict(),
        }

    def restore(self, start: Start) -> None:
        """Continues from a checkpoint: the trainer, and the files that belong to it.

        Raises:
            DataError: If the checkpoint does not fit the run.
        """
        state = start.state
        try:
            if difference := describe_difference(state["data"], self.trainer.problem.sizes()):
                raise DataError(f"the data has changed: {difference}")
            self.trainer.load_state_dict(state)
            now = self.trainer.place()
            difference = describe_difference({name: state.get(name) for name in now}, now)
        except Exception as error:  # whatever torch says of a state that is not its own
            what = str(error) if isinstance(error, FlatminError) else f"{type(error).__name__}: {error}"
            raise DataError(f"{start.checkpoint}: the checkpoint does not fit this run: {what:.400}") from error
        if difference:
            warnings.warn(
                f"since the checkpoint was made, {difference}; the result will not be bit-identical to that of a run "
                "that was never ended",
                FlatminWarning,
                stacklevel=2,
            )
        if _distributed.rank() == 0:
            restore_files(self.folder, start)
            self._files.written()
        self.metrics = state["metrics"]
        self._start = start.checkpoint
        self._last_is_good = start.checkpoint.resolve() == (self.folder / LAST).resolve()

    def step_done(self) -> None:
        """Writes a checkpoint in the middle of an epoch if one is due; at its end, `epoch_done` does."""
        steps = self.trainer.progress.steps
        if steps == len(self.trainer.loader):
            return
        # The state is gathered from all ranks, so they must agree on when; asking at every step would cost time.
        if _distributed.size() == 1 or self.minutes == 0 or steps % ASK_EVERY == 0:
            due = time.monotonic() - self._saved >= 60 * self.minutes
            if _distributed.from_first(due):
                state = self.gather()
                if _distributed.rank() == 0:
                    self._save(state)

    def epoch_done(self, metrics: dict[str, float]) -> None:
        """Writes the checkpoint of an epoch first, and then what can be made from it.

        Raises:
            OutputError: If it cannot be written, or what was written before is gone.
        """
        self.metrics.append(metrics)
        state = self.gather()
        if _distributed.rank() == 0:
            with held():
                self._save(state)
                _keep_best(self.folder, self.folder / LAST, self.metrics, durable=self.durable)
                self._files.check(epochs=len(self.metrics))
                append_line(self.folder / METRICS, metrics)
                self._files.written()

    @held()
    def _save(self, state: dict[str, Any]) -> None:
        self._files.check_folder(epochs=len(state["metrics"]))
        self._saved = time.monotonic()
        # A checkpoint at `last` that was not continued from, damaged or given up, must not push out the good one.
        previous = self.folder / PREVIOUS if self._last_is_good else None
        try:
            save_checkpoint(self.folder / LAST, state, previous=previous, durable=self.durable)
        except OutputError as error:
            if not self._start.exists():
                raise
            whole = "the one before it" if self._last_is_good else f"{self._start}, which it was started from,"
            go_on = shlex.quote(str(self.folder if self._last_is_good else self._start))
            when = "when there is room" if _is_full(error.__cause__) else "to go on"
            raise OutputError(f"{error}; {whole} is intact; {when}: flatmin train --resume {go_on}") from error
        self._start = self.folder / LAST
        self._last_is_good = True


def _is_full(error: BaseException | None) -> bool:
    """Whether the error says that the disk is full; safetensors has the number in its text."""
    numbers = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


@held()
def restore_files(folder: Path, start: Start) -> None:
    """Restores ``metrics.jsonl`` and ``checkpoints/best`` as they were when a checkpoint was made.

    Raises:
        OutputError: If they cannot be written.
    """
    metrics = start.state["metrics"]
    if metrics:
        write_lines(folder / METRICS, metrics)
    else:
        try:
            (folder / METRICS).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{folder / METRICS}: cannot be removed: {error.strerror}") from error
    if start.state["progress"]["steps"] == 0:
        _keep_best(folder, start.checkpoint, metrics)


def _keep_best(folder: Path, checkpoint: Path, metrics: Sequence[dict[str, float]], *, durable: bool = True) -> None:
    """Keeps the checkpoint of the last of these epochs if it is the best one."""
    accuracies = [line["test_accuracy"] for line in metrics]
    if not accuracies or accuracies.index(max(accuracies)) != len(accuracies) - 1:
        return
    best = folder / BEST
    try:
        same = read_bytes(best / STATE) == read_bytes(checkpoint / STATE)
    except DataError:  # there is none yet, or it is damaged
        same = False
    if not same:
        copy_checkpoint(checkpoint, best, durable=durable)
