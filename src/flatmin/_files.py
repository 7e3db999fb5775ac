"""Files that survive a crash: written to the side, forced to the disk, renamed; JSON; and a lock on a folder."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ._interrupts import held
from .errors import OutputError

LOCK = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # of a file system without them


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


@held()
def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one piece: a crash leaves the old content or the new, and never a part.

    Raises:
        OutputError: If it cannot be written; what was there before stays.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time write into a run's folder; when a process dies the kernel lets go of its lock.

    Where the system or the file system has no such locks, nothing is locked.

    Raises:
        OutputError: If another process has it.
    """
    file = _lock(folder)
    _held.add(file)
    try:
        yield
    finally:
        with held():
            _held.discard(file)
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            file.close()


def _lock(folder: Path) -> Any:
    path = folder / LOCK
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None  # type: ignore[assignment]  # a module's name
    while True:
        try:
            file = path.open("a")
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise OutputError(
                f"{folder}: another process is writing this run at the moment; wait until it ends, or end it"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise OutputError(f"{folder}: cannot be locked ({error.strerror})") from error
        file.close()  # its last holder has removed it between our opening and locking it


_held: set[Any] = set()


def _forget() -> None:
    """Closes the locks in a process that was forked: a loader's worker must not hold one longer than its run."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
