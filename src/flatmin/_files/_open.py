"""Opening what may be anything: a file and nothing else, without following a link and without waiting for a pipe."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Windows lacks the first two, and it alone has the third.
_NO_LINK, _NO_WAIT, _BINARY = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link, and flatmin follows none within a run's folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


class WrongKindError(OSError):
    """A link, a pipe, a device or a folder where a file is expected; ``strerror`` says which."""


def open_file(path: Path, *, follow: bool = False) -> BinaryIO:
    """Opens a file for reading.

    Args:
        path: The file.
        follow: Whether it may be a link, as what the user has named.

    Raises:
        WrongKindError: If it is something else than a file.
        OSError: If it cannot be opened.
    """
    return os.fdopen(open_descriptor(path, os.O_RDONLY, follow=follow), "rb")


def open_descriptor(path: Path, flags: int, *, follow: bool = False) -> int:
    """Opens a file by the flags of `os.open`, among which may be that it is made; see `open_file`."""
    try:
        _check_file(os.stat(path) if follow else os.lstat(path))  # to open a device may do something
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(path, flags | _NO_WAIT | _BINARY | (0 if follow else _NO_LINK), 0o666)
    try:
        _check_file(os.fstat(descriptor))  # it may be another by now
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_folder(path: Path) -> None:
    """Checks that a path is a folder itself, and no link to one.

    Raises:
        NotADirectoryError: If it is something else; ``strerror`` says what.
        OSError: If it is missing, or cannot be looked at.
    """
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, f"Not a directory but {_kind(mode)}")


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise WrongKindError(errno.EINVAL, f"it is not a file but {_kind(found.st_mode)}")


def _kind(mode: int) -> str:
    return next((name for holds, name in _KINDS if holds(mode)), "a device")
