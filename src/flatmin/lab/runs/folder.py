"""The folder of a run or of a comparison: made, and removed again if nothing comes of it."""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ..._interrupts import held
from ...errors import OutputError
from ..results import CONFIG, EXPERIMENT, LAST, METRICS, RESULTS, RUNS, SELECTION
from .present import identity


@contextmanager
def run_folder(out: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """Makes the folder of a run; it must be new or empty.

    If an error ends the block before the first epoch or checkpoint is done, the folder is removed again.

    Args:
        out: Where; None for a new folder under ``runs/``, named by the time and ``name``.
        name: What the run is, such as ``"saf-seed0"``.

    Raises:
        OutputError: If it cannot be made or written, or is not empty.
    """
    wanted = Path(out) if out is not None else Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    missing = [path for path in (wanted, *wanted.parents) if not path.exists()]
    folder = made = None
    try:
        with held():
            folder = _new_folder(wanted, numbered=out is None)
            made = identity(folder)
        yield folder
    except BaseException:
        # Removed meanwhile, it is somebody else's by now.
        if folder is not None and identity(folder) == made:
            with held():
                if not holds_work(folder):
                    _remove(folder, missing)
        raise


def holds_work(folder: Path) -> bool:
    """Whether an epoch or a checkpoint of a run is anywhere in the folder."""
    return any(folder.rglob(METRICS)) or any(folder.rglob(LAST))


def _remove(folder: Path, missing: Sequence[Path]) -> None:
    for name in (Path(LAST).parent.name, RUNS, SELECTION):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (CONFIG, EXPERIMENT, RESULTS):
        (folder / name).unlink(missing_ok=True)
    for path in (folder, *missing[1:]) if missing else ():
        with suppress(OSError):  # somebody else has put something there meanwhile
            path.rmdir()


def _new_folder(wanted: Path, *, numbered: bool) -> Path:
    for number in itertools.count():
        folder = wanted.with_name(f"{wanted.name}-{number}") if number else wanted
        try:
            folder.mkdir(parents=True, exist_ok=not numbered)
            if any(folder.iterdir()):
                raise FileExistsError
            (folder / CONFIG).touch(exist_ok=False)  # of two runs that begin at once, one fails here
            return folder
        except FileExistsError:
            if numbered:  # by a run that began in the same second
                continue
            what = "holds something already" if folder.is_dir() else "is a file"
            raise OutputError(f"{folder}: {what}; give --out a new folder, every run has its own") from None
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror}); give --out another folder") from error
    raise AssertionError("unreachable")
