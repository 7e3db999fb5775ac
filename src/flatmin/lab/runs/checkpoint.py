"""Checkpoints: tensors in safetensors, everything else in JSON; no pickle is written or read.

A checkpoint is a folder with ``tensors.safetensors`` and ``state.json``. The latter has the version of the format, the
digests of both files, and the nested state with each tensor replaced by its name. It is written to the side, forced to
the disk and renamed: at every moment there is an intact checkpoint, under its own name or, during the renaming, where
`settle` finds it. Nothing is interpreted before its digest has been checked.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._files import WrongKindError, check_folder, copy_file, open_file, remove, sync, write_new
from ...errors import DataError, OutputError, require

TENSORS, STATE = "tensors.safetensors", "state.json"
VERSION = 1
LARGEST_STATE = 2**26  # bytes; the state of a network with a hundred thousand tensors is about a fifth of that

_VERSION = re.compile(rb'\{"format": "flatmin checkpoint", "version": (\d{1,9}), ')
# A JSON object as it is written, byte for byte, so that no byte of it can change unnoticed.
_DOCUMENT = re.compile(
    rb'\{"format": "flatmin checkpoint", "version": \d{1,9}, "tensors": "(?P<tensors>[0-9a-f]{64})", '
    rb'"bytes": (?P<bytes>\d{1,18}), "digest": "(?P<digest>[0-9a-f]{64})", "state": (?P<state>.*)\}\n',
    re.DOTALL,
)


def save_checkpoint(folder: Path, state: dict[str, Any], *, previous: Path | None = None, durable: bool = True) -> None:
    """Writes ``state``, nested dictionaries and lists of tensors, bytes and plain values, as the checkpoint ``folder``.

    Args:
        folder: Where to; an existing checkpoint is replaced.
        state: The state.
        previous: Where the replaced checkpoint goes; None: it is dropped.
        durable: Whether to wait until it is on the disk itself, so that it survives a power failure.

    Raises:
        OutputError: If it cannot be written; the existing checkpoints stay.
    """
    safetensors = require("safetensors.torch", install="flatmin[cli]")
    full_disk = require("safetensors", install="flatmin[cli]").SafetensorError
    tensors: dict[str, Tensor] = {}
    skeleton = _strip(state, "", tensors, set())
    fresh = _beside(folder, "new")
    try:
        remove(fresh)
        fresh.mkdir(parents=True)
        body = json.dumps(skeleton).encode()
        safetensors.save_file(tensors, fresh / TENSORS)
        size, digest = (fresh / TENSORS).stat().st_size, _digest(fresh / TENSORS)
        head = (
            f'{{"format": "flatmin checkpoint", "version": {VERSION}, "tensors": "{digest}", "bytes": {size}, '
            f'"digest": "{hashlib.sha256(body).hexdigest()}", "state": '
        )
        write_new(fresh / STATE, head.encode() + body + b"}\n")
        if durable:
            for path in (fresh / TENSORS, fresh / STATE, fresh):
                sync(path)
        _put(fresh, folder, previous, durable=durable)
    except BaseException as error:
        for path in (folder, previous or folder):
            with suppress(DataError, OSError):  # the first error is the one to tell
                settle(path)
        if isinstance(error, (OSError, full_disk)):
            raise OutputError(f"{folder}: the checkpoint could not be written: {error}") from error
        raise


def copy_checkpoint(source: Path, folder: Path, *, durable: bool = True) -> None:
    """Copies a checkpoint; the files are shared (hard links) where the file system can.

    Args:
        source: The checkpoint to copy.
        folder: Where to; an existing checkpoint is replaced.
        durable: As for `save_checkpoint`.

    Raises:
        OutputError: If it cannot be written.
    """
    fresh = _beside(folder, "new")
    try:
        remove(fresh)
        fresh.mkdir(parents=True)
        for name in (TENSORS, STATE):
            try:
                os.link(source / name, fresh / name)
            except OSError:
                copy_file(source / name, fresh / name)
                if durable:
                    sync(fresh / name)
        if durable:
            sync(fresh)
        _put(fresh, folder, None, durable=durable)
    except BaseException as error:
        with suppress(DataError, OSError):
            settle(folder)
        if isinstance(error, OSError):
            raise OutputError(f"{folder}: the checkpoint could not be written: {error}") from error
        raise


class _IncompleteError(ValueError):
    """A file is incomplete or differs from what was written."""


def settle(folder: Path) -> None:
    """Finishes what a crash interrupted: a checkpoint between two names gets its own, and leftovers are removed.

    Raises:
        DataError: If what may be the only checkpoint cannot be read although it is complete; it stays where it is.
    """
    fresh, stale = _beside(folder, "new"), _beside(folder, "old")
    if os.path.lexists(fresh) and not os.path.lexists(folder):
        try:
            load_checkpoint(fresh)
            fresh.rename(folder)
        except DataError as error:
            if not isinstance(error.__cause__, (FileNotFoundError, _IncompleteError)):
                raise DataError(f"{error}; it may be the newest: move it away to go on without it") from error
    if os.path.lexists(stale) and not os.path.lexists(folder):  # it was whole when it was renamed
        check_folders(stale)
        stale.rename(folder)
    for path in (fresh, stale):
        remove(path)


def check_folders(*paths: Path) -> None:
    """Checks that each is a folder and no link to one, or missing.

    Raises:
        DataError: If one is something else.
    """
    for path in paths:
        try:
            check_folder(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be used: {error.strerror}") from error


def load_checkpoint(folder: Path, only: Collection[str] | None = None) -> Any:
    """Reads what `save_checkpoint` wrote.

    Args:
        folder: The checkpoint.
        only: The entries of the state to read; the tensors of the others take no memory. None: all.

    Raises:
        DataError: If it is missing or damaged, or something else.
    """
    safe_open = require("safetensors", install="flatmin[cli]").safe_open
    name = STATE
    try:
        check_folder(folder)
        content = _read(folder / STATE)
        name = TENSORS
        _check_tensors(folder / TENSORS, content)
        # Copied, since what safe_open returns is the file itself, mapped into memory.
        with safe_open(folder / TENSORS, "pt") as file:
            names = [key for key in file.keys() if only is None or key.partition(".")[0] in only]  # noqa: SIM118
            tensors = {key: file.get_tensor(key).clone() for key in names}
        name = STATE
        skeleton = json.loads(content["state"])
        if only is not None:
            skeleton["items"] = [[key, item] for key, item in skeleton["items"] if key in only]
        state = _fill(skeleton, tensors)
        if tensors:
            raise ValueError(f"it lacks the tensor {next(iter(tensors))!r:.200}")
        return state
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no checkpoint there; {name} is missing") from error
    except NotADirectoryError as error:
        raise DataError(f"{folder}: the checkpoint cannot be read: {error.strerror}") from error
    except WrongKindError as error:
        raise DataError(f"{folder}: the checkpoint is damaged: {name}: {error.strerror}") from error
    except OSError as error:
        raise DataError(f"{folder}: the checkpoint cannot be read: {name}: {error.strerror}") from error
    except Exception as error:  # safetensors, JSON, recursion and memory have errors of their own
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{folder}: the checkpoint is damaged: {name}: {what:.400}") from error


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _put(fresh: Path, folder: Path, previous: Path | None, *, durable: bool) -> None:
    """Renames ``fresh`` to ``folder``; what was there goes to ``previous``, or goes."""
    stale = _beside(previous or folder, "old")
    first = not os.path.lexists(folder)
    if not first:
        remove(stale)
        if previous is not None and os.path.lexists(previous):
            previous.rename(stale)
        folder.rename(previous or stale)
    fresh.rename(folder)
    if durable:
        sync(folder.parent)
        if first:  # its parent may be as new
            sync(folder.parent.parent)
    remove(stale)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, bytes]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_STATE:
            raise ValueError(f"it has {size} bytes, and no checkpoint has more than {LARGEST_STATE}")
        written = file.read(size)
    version = _VERSION.match(written)
    if version is not None and int(version[1]) != VERSION:
        raise ValueError(f"it has version {int(version[1])}, and this flatmin reads version {VERSION}")
    content = _DOCUMENT.fullmatch(written)
    if content is None:
        raise _IncompleteError("it is cut short, changed, or was not written by flatmin")
    if hashlib.sha256(content["state"]).hexdigest() != content["digest"].decode():
        raise _IncompleteError("its content is not what was written: the digest differs")
    return content.groupdict()


def _check_tensors(path: Path, content: dict[str, bytes]) -> None:
    with open_file(path) as file:
        size, written = os.fstat(file.fileno()).st_size, int(content["bytes"])
    if size != written:
        raise _IncompleteError(f"it has {size} bytes, and {written} were written")
    if _digest(path) != content["tensors"].decode():
        raise _IncompleteError("its content is not what was written: the digest differs")


def _strip(value: Any, name: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """Takes the tensors out of a nested state; a dictionary becomes a list of pairs, since its keys may be numbers."""
    if isinstance(value, Tensor):
        if value.is_complex():  # not all kinds of which safetensors has
            return {"complex": _strip(torch.view_as_real(value.detach().resolve_conj()), name, tensors, storages)}
        while name in tensors:  # the keys "a.b" and "a", "b"
            name += "'"
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses two names that share memory. All else is written from where it is: it may be large.
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{name}: the key {key!r} cannot be stored in a checkpoint")
        return {"items": [[k, _strip(v, f"{name}.{k}".lstrip("."), tensors, storages)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_strip(item, f"{name}.{number}", tensors, storages) for number, item in enumerate(value)]
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: {type(value).__name__} cannot be stored in a checkpoint")


def _fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts the tensors back, each of them once."""
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        if value["tensor"] not in tensors:
            raise ValueError(f"it names a tensor that {TENSORS} lacks: {value['tensor']!r:.200}")
        return tensors.pop(value["tensor"])
    if "complex" in value:
        return torch.view_as_complex(_fill(value["complex"], tensors))
    if "bytes" in value:
        return base64.b64decode(value["bytes"], validate=True)
    return dict(_pairs(value["items"], tensors))


def _pairs(items: Any, tensors: dict[str, Tensor]) -> Iterator[tuple[Any, Any]]:
    for key, item in items:
        yield key, _fill(item, tensors)
