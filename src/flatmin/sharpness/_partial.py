"""Work that goes on after an interruption: the losses found so far, in a file of their own."""

import hashlib
import json
import math
import os
from pathlib import Path

from torch import Tensor

from .._files import read_text, write_whole
from ..errors import DataError


class Partial:
    """The losses of a landscape, in the order in which they are found, on disk.

    Args:
        path: The file; None to keep nothing.
        key: From `fingerprint`; what the losses are of.
        origin: The loss at the origin, which tells other data.

    Raises:
        DataError: If the file is of another landscape, or is none.
    """

    def __init__(self, path: Path | None, key: str, origin: float) -> None:
        self._path, self._key, self._origin = path, key, origin
        self.losses: list[float] = []
        if path is None or not os.path.lexists(path):
            return
        try:
            found = json.loads(read_text(path))
            losses = [float(loss) for loss in found["losses"]]
            same = found["key"] == key and math.isclose(found["origin"], origin, rel_tol=1e-3)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}: not the beginning of a landscape; move it away to begin anew") from error
        if not same:
            raise DataError(
                f"{path}: the beginning of another landscape, of other weights, data or options: go on with those, or "
                "remove it to begin anew"
            )
        self.losses = losses

    def save(self) -> None:
        """Writes what there is, in one piece.

        Raises:
            OutputError: If it cannot be written; what was there before stays.
        """
        if self._path is None:
            return
        found = {"key": self._key, "origin": self._origin, "losses": self.losses}
        write_whole(self._path, json.dumps(found).encode())


def fingerprint(tensors: list[Tensor], *values: object) -> str:
    """Tells landscapes apart: a digest of tensors, byte by byte, and of plain values."""
    digest = hashlib.sha256(repr(values).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
