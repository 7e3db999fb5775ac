"""The helper of the tests of several ranks is itself to be trusted."""

import time
import warnings

import pytest
import torch
from torch import distributed

from tests.distributed._spawn import run_ranks


def add(number: int) -> torch.Tensor:
    total = torch.tensor(number + distributed.get_rank())
    distributed.all_reduce(total)
    return total


def fail(kind: str) -> None:
    if distributed.get_rank() == 1:
        if kind == "raises":
            raise KeyError("on rank one")
        if kind == "warns":
            warnings.warn("on rank one", UserWarning, stacklevel=1)
        if kind == "hangs":
            time.sleep(60)
    distributed.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_talk_to_each_other_and_answer_in_order(world_size):
    assert run_ranks(add, world_size, 10) == [torch.tensor(sum(range(10, 10 + world_size)))] * world_size
    assert run_ranks(distributed.get_rank, world_size) == list(range(world_size))


@pytest.mark.parametrize(
    ("kind", "message", "timeout"),
    [("raises", "rank 1: Traceback", 60), ("warns", "rank 1: Traceback", 60), ("hangs", "did not end in time", 2)],
)
def test_what_goes_wrong_on_one_rank_is_said(kind, message, timeout):
    with pytest.raises(RuntimeError, match=message):
        run_ranks(fail, 2, kind, timeout=timeout)
