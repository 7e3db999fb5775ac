"""Reading files of a bounded size, as bytes, text and JSON."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import DataError
from ._open import open_file

LARGEST = 2**28  # bytes of results, metrics, landscapes, pages
LARGEST_SETUP = 2**24  # bytes of a configuration or an experiment file


def read_bytes(path: Path, *, most: int = LARGEST, follow: bool = False) -> bytes:
    """Reads a file.

    Args:
        path: The file.
        most: Its largest size in bytes.
        follow: Whether it may be a link, as what the user has named; what lies in a run's folder may not.

    Raises:
        DataError: If it is missing, too large or no file, or cannot be read.
    """
    try:
        with open_file(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= most:
                return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    raise DataError(f"{path}: cannot be read (it has {size} bytes, and no such file of flatmin has more than {most})")


def read_text(path: Path, *, most: int = LARGEST, follow: bool = False) -> str:
    """Reads a text file, see `read_bytes`.

    Raises:
        DataError: As `read_bytes`, and if it holds something else.
    """
    try:
        return read_bytes(path, most=most, follow=follow).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a file of flatmin: it is no text") from error


def read_json(path: Path, *, most: int = LARGEST, follow: bool = False) -> dict[str, Any]:
    """Reads a file that holds a JSON object, see `read_bytes`.

    Raises:
        DataError: As `read_bytes`, and if it holds something else.
    """
    return parse_json(read_text(path, most=most, follow=follow), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Reads a JSON object; numbers that are not finite become None.

    Args:
        text: The JSON.
        where: The file, for the error.

    Raises:
        DataError: If it is something else.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is damaged, it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a file of flatmin: it holds no JSON object")
    return value
