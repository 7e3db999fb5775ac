"""A lock on a folder, that ends with its holder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._interrupts import held
from ..errors import OutputError
from ._open import open_descriptor

LOCK = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # of a file system without them


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
            file = os.fdopen(open_descriptor(path, os.O_WRONLY | os.O_CREAT), "wb")
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({LOCK}: {error.strerror})") from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
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
