"""Where rows are kept: in memory, or in a scratch file on a disk."""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._interrupts import held
from ..errors import InvalidArgumentError, OutputError


def zeros(shape: Sequence[int], *, what: str, device: str | None = None) -> Tensor:
    """Returns zeros, uint8, if this machine has the memory at all; without ``device`` on torch's default one.

    Raises:
        InvalidArgumentError: If it does not; the message names ``what`` and smaller forms.
    """
    size, there = math.prod(shape), physical_memory()
    try:
        if there is not None and size > there:  # memory is taken when it is written to, and the process killed then
            raise MemoryError
        return torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        has = "" if there is None else f" and this machine has {there / 1e9:.1f}"
        raise InvalidArgumentError(
            f"{what} needs {size / 1e9:.1f} GB{has}: take a smaller form, history='int6' or 'lowrank', or keep it on a "
            "disk, path=FOLDER"
        ) from error


@held()
def scratch_file(folder: Path, shape: Sequence[int]) -> Tensor:
    """Returns zeros, uint8, memory-mapped from a nameless file in ``folder`` that reserves all its room at once.

    Raises:
        OutputError: If the file cannot be made, or the disk has no room for it.
    """
    size = math.prod(shape)
    if size == 0:  # a rank that keeps nothing
        return torch.zeros(tuple(shape), dtype=torch.uint8, device="cpu")
    try:
        descriptor, name = tempfile.mkstemp(prefix="flatmin-history-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # a full disk raises here, instead of killing the process later
            else:
                os.truncate(descriptor, size)
            return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(*shape)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"path {str(folder)!r}: a history of {size / 1e9:.3g} GB cannot be kept there ({error}); give a folder "
            "that exists, on a disk with room"
        ) from error


def physical_memory() -> int | None:
    """Bytes of main memory; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
