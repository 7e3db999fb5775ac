"""What runs logged, as TensorBoard's event files."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..._interrupts import held
from ...errors import OutputError, require
from ..results.values import number
from ._study import Study

_OURS = ".flatmin"  # ends the names of our files, so that a later call replaces these and no others


def write_events(studies: Sequence[Study], folder: Path) -> list[Path]:
    """Writes every number of every epoch, a folder for each row and seed, at the number of epochs done.

    Args:
        studies: What was read; several number their folders.
        folder: Where to; what flatmin wrote there before is replaced.

    Returns:
        The runs' folders; those of runs that have logged nothing are not made.

    Raises:
        OutputError: If it cannot be written.
        MissingDependencyError: If TensorBoard is not installed.
    """
    require("tensorboard", install="flatmin[tensorboard]")
    writer = require("torch.utils.tensorboard", install="flatmin[tensorboard]").SummaryWriter
    written: list[Path] = []
    for place, study in enumerate(studies, start=1):
        for run in study.runs:
            if not run.metrics:
                continue
            name = _plain(run.label) + f"-seed{run.seed}"
            target = folder / (name if len(studies) == 1 else f"{place}-{name}")
            while target in written:
                target = target.with_name(target.name + "'")
            try:
                old = list(target.glob(f"events.out.tfevents.*{_OURS}"))
                with held(), writer(str(target), filename_suffix=_OURS) as events:
                    for index, metrics in enumerate(run.metrics):
                        epoch = number(metrics.get("epoch"))
                        done = int(index if epoch is None else epoch) + 1
                        for metric, given in metrics.items():
                            value = number(given)
                            if value is not None and metric != "epoch":
                                events.add_scalar(metric, value, done)
                for file in old:
                    file.unlink()
            except (OSError, UnicodeError) as error:  # TensorBoard writes no name that is not UTF-8
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{target}: cannot be written ({reason})") from error
            written.append(target)
    return written


def _plain(label: str) -> str:
    """A label as a folder's name: what could leave the folder, or a file system does not like, becomes a dash."""
    return re.sub(r"[^\w.=+-]+", "-", label).lstrip(".") or "run"
