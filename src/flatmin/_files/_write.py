"""Files that survive a crash: written to the side, forced to the disk, renamed; JSON."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._interrupts import held
from ..errors import OutputError
from ._open import open_descriptor, open_file


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk itself."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows forces no file it only reads
    except PermissionError:
        if os.name == "nt" and path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a new file in place of whatever file or link lies there.

    Args:
        path: The file.
        content: What it is to hold.
        durable: Whether to wait until it is on the disk itself.

    Raises:
        OSError: If it cannot be written.
    """
    descriptor = _create(path)
    try:
        _write(descriptor, content)
        if durable:
            os.fsync(descriptor)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise OSError(errno.EBUSY, "another process is writing it at the moment")
    finally:
        os.close(descriptor)


def copy_file(source: Path, path: Path) -> None:
    """Copies a file to a new one, in place of whatever file or link lies there.

    Raises:
        OSError: If it cannot be copied.
    """
    with open_file(source) as file:
        descriptor = _create(path)
        try:
            while chunk := file.read(2**20):
                _write(descriptor, chunk)
        finally:
            os.close(descriptor)


def _create(path: Path) -> int:
    with suppress(FileNotFoundError):
        os.unlink(path)  # of a link this removes the link
    return open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def remove(path: Path) -> None:
    """Removes a file, a link itself, or a folder with what is in it; what cannot be removed stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@held()
def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one piece: a crash leaves the old content or the new, and never a part.

    A link of that name is replaced, and what it leads to stays as it is.

    Raises:
        OutputError: If it cannot be written; what was there before stays.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        write_new(fresh, content, durable=True)
        fresh.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error}") from error


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


@held()
def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Adds ``value`` to such a file. On a full disk, the lines before it stay and nothing of it is left.

    Raises:
        OutputError: If it cannot be written.
    """
    line = (json.dumps(plain(value)) + "\n").encode()
    try:
        descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line)
            except OSError:
                os.truncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def plain(value: Any) -> Any:
    """Replaces what JSON cannot say: numbers that are not finite, by None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
