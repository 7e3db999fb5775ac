"""Checkpoints: tensors in safetensors, everything else in JSON; no pickle is written or read.

A checkpoint is a folder with ``tensors.safetensors`` and ``state.json``, the state's own shape with each tensor
replaced by its name. It is written beside the old one and renamed, so that a crash leaves a whole one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError, OutputError, require

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``state``, nested dictionaries and lists of tensors and plain values, over what is at ``folder``.

    Raises:
        OutputError: If it cannot be written.
    """
    safetensors = require("safetensors.torch", install="flatmin[cli]")
    full_disk = require("safetensors", install="flatmin[cli]").SafetensorError
    tensors: dict[str, Tensor] = {}
    skeleton = _strip(state, "", tensors)
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        if folder.exists():
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        safetensors.save_file(tensors, fresh / TENSORS)
        (fresh / STATE).write_text(json.dumps(skeleton))
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)
    except (OSError, full_disk) as error:
        raise OutputError(f"{folder}: the checkpoint could not be written: {error}") from error


def load_checkpoint(folder: Path) -> Any:
    """Reads what `save_checkpoint` wrote.

    Raises:
        DataError: If it is not there or not whole.
    """
    safetensors = require("safetensors.torch", install="flatmin[cli]")
    stale = folder.with_name(folder.name + ".old")
    if stale.exists() and not folder.exists():  # a crash between the two renames
        folder = stale
    try:
        tensors = safetensors.load_file(folder / TENSORS)
        return _fill(json.loads((folder / STATE).read_text()), tensors)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no checkpoint there") from error
    except Exception as error:  # safetensors raises its own kind, JSON another
        raise DataError(f"{folder}: the checkpoint is damaged: {error}") from error


def _strip(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Takes the tensors out of a nested state; a dictionary becomes a list of pairs, since its keys may be numbers."""
    if isinstance(value, Tensor):
        # A copy, since two names may share memory, which safetensors refuses.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _strip(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_strip(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: {type(value).__name__} cannot be stored in a checkpoint")


def _fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {k: _fill(v, tensors) for k, v in value["items"]}
    return value
