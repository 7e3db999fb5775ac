"""MESA under DistributedDataParallel: one average, the same on all ranks."""

import pytest
import torch
from torch import nn

import flatmin
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks

STEPS = 5


def train(model: nn.Module, mesa: flatmin.MESA, attached: bool) -> None:
    optimizer = problem.sgd(model)
    if attached:
        mesa.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = problem.batch(step)
        logits = model(x)
        (nn.functional.cross_entropy(logits, y) + mesa(logits, x)).backward()
        optimizer.step()
        if not attached:
            mesa.update()


def replicated(norm: bool, attached: bool, compiled: bool = False, broadcast: bool = True) -> dict[str, torch.Tensor]:
    inner = problem.network(norm)
    model = nn.parallel.DistributedDataParallel(inner)
    model.broadcast_buffers = broadcast
    model = torch.compile(model, backend="eager") if compiled else model
    mesa = flatmin.MESA(model, coefficient=5.0, decay=0.7, start_epoch=0)
    train(model, mesa, attached)
    return mesa.average.module.state_dict()


def alone() -> dict[str, torch.Tensor]:
    model = problem.network()
    mesa = flatmin.MESA(model, coefficient=5.0, decay=0.7, start_epoch=0)
    train(model, mesa, attached=True)
    return mesa.average.module.state_dict()


def test_average_is_that_of_one_process_on_the_whole_batch():
    ours, theirs = run_ranks(replicated, 2, False, True)
    problem.assert_same(list(ours.values()), list(theirs.values()))
    problem.assert_close(list(ours.values()), list(alone().values()))


@pytest.mark.parametrize(("attached", "compiled"), [(True, False), (False, False), (True, True)])
def test_average_is_the_same_on_all_ranks_with_its_statistics(attached, compiled):
    ours, theirs = run_ranks(replicated, 2, True, attached, compiled)
    assert "1.running_mean" in ours
    problem.assert_same(list(ours.values()), list(theirs.values()))


def test_statistics_differ_where_their_broadcast_is_switched_off():
    ours, theirs = run_ranks(replicated, 2, True, True, False, False)
    assert not torch.equal(ours["1.running_mean"], theirs["1.running_mean"])
    assert torch.equal(ours["0.weight"], theirs["0.weight"])
