"""What is recorded about a run beside its numbers: the command, versions, hardware; and JSON that any reader takes."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..._files import plain as plain
from ..._files import write_json as write_json


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
