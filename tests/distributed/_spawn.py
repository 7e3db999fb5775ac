"""Runs a function on several ranks of one machine.

A rank is a process forked from a server that has loaded torch, so that only the first call of a session waits for that.
"""

import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.fresh import SERVER


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Calls ``function(*args)`` on each rank of a gloo process group, and returns what each returned, by rank.

    Args:
        function: A function of a module, so that it can be found by its name. Warnings are errors in it, as in tests.
        world_size: Number of ranks; ``torch.distributed.get_rank()`` says which one the function is in.
        *args: What can be pickled.
        timeout: Seconds for all.

    Raises:
        RuntimeError: With the traceback of every rank that raised or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            SERVER.Process(target=_rank, args=(function, rank, world_size, folder, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(process.exitcode for process in ranks):  # the others may wait for it: a moment, for their own errors
                deadline = min(deadline, time.monotonic() + 5)
        for process in ranks:
            process.kill()
            process.join()
        errors = [_error(Path(folder), rank) for rank in range(world_size)]
        if any(errors):
            raise RuntimeError("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
        distributed.barrier()  # nobody leaves while another still talks to it
        distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others


def _error(folder: Path, rank: int) -> str:
    error, result = folder / f"{rank}.error", folder / f"{rank}.pt"
    if error.exists():
        return error.read_text()
    return "" if result.exists() else "did not end in time\n"
