"""What is written down about a run: its folder, its configuration, the machine."""

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError


def new_folder(out: str | Path | None, name: str) -> Path:
    """Makes the folder of a run, never one that holds something already.

    Args:
        out: The folder the user asked for; None for a new one under ``runs/``, named by time and ``name``.
        name: What the run is, for that name.

    Raises:
        OutputError: If it cannot be made or written, or holds something.
    """
    if out is None:
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
        for number in range(1000):
            folder = Path("runs") / (stem if number == 0 else f"{stem}-{number}")
            if _make(folder, fresh=True):
                return folder
    folder = Path(out or "runs")
    _make(folder, fresh=False)
    if any(folder.iterdir()):
        raise OutputError(f"{folder}: holds something already; give --out a new folder, every run has its own")
    return folder


def _make(folder: Path, *, fresh: bool) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        if fresh:
            return False
        raise OutputError(f"{folder}: is a file; give --out a folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); give --out another folder") from error
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON in one piece; numbers that are not finite become null.

    Raises:
        OutputError: If it cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(json.dumps(plain(value), indent=2) + "\n")
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Adds ``value`` to a file of one JSON object a line.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(plain(value)) + "\n")
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
    for package in ("flatmin", "torch", "numpy", "scipy", "scikit-learn", "torchvision", "timm"):
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
