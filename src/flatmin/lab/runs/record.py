"""What is written down about a run: its folder, its configuration, the machine."""

import errno
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..._files import write_whole
from ...errors import OutputError

# The files and checkpoints in a run's folder.
CONFIG, METRICS, EXPERIMENT = "config.json", "metrics.jsonl", "experiment.py"
LAST, PREVIOUS, BEST = "checkpoints/last", "checkpoints/previous", "checkpoints/best"


@contextmanager
def run_folder(out: str | None, name: str) -> Iterator[Path]:
    """Makes the folder of a run, never one that holds something already.

    If what is done with it ends in an error before an epoch or a checkpoint is done, nothing of it is left behind.

    Args:
        out: The folder the user asked for; None for a new one under ``runs/``, named by time and ``name``.
        name: What the run is, for that name.

    Raises:
        OutputError: If it cannot be made or written, or holds something.
    """
    wanted = Path(out) if out is not None else Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    missing = [path for path in (wanted, *wanted.parents) if not path.exists()]
    folder = _new_folder(wanted, numbered=out is None)
    try:
        yield folder
    except BaseException:
        if not any(folder.rglob(METRICS)) and not any(folder.rglob(LAST)):
            for name in ("checkpoints", "runs", "selection"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in (CONFIG, EXPERIMENT, "results.json"):
                (folder / name).unlink(missing_ok=True)
            for path in (folder, *missing[1:]) if missing else ():
                with suppress(OSError):  # somebody else has put something there meanwhile
                    path.rmdir()
        raise


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


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON in one piece; numbers that are not finite become null.

    Raises:
        OutputError: If it cannot be written.
    """
    write_whole(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def write_lines(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of one JSON object a line in one piece; numbers that are not finite become null.

    Raises:
        OutputError: If it cannot be written.
    """
    write_whole(path, "".join(json.dumps(plain(value)) + "\n" for value in values).encode())


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Adds ``value`` to such a file. On a full disk, the lines before it stay and nothing of it is left.

    Raises:
        OutputError: If it cannot be written.
    """
    line = (json.dumps(plain(value)) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def plain(value: Any) -> Any:
    """Replaces what JSON cannot say: numbers that are not finite, by None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line() -> str:
    """The command that is running, as it could be typed."""
    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "flatmin"), *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Versions and hardware, without anything that names the machine."""
    versions = {"python": platform.python_version()}
    for package in ("flatmin", "torch", "numpy", "scipy", "scikit-learn", "torchvision", "timm", "mnist1d"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
