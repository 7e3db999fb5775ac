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


def refreshed(kind: str) -> dict[str, torch.Tensor]:
    """Each rank makes the statistics from batches of its own; the second has one more."""
    model = problem.replicated(norm=True)
    average = {
        "EMA": lambda: flatmin.EMA(model, decay=0.7),
        "SwitchEMA": lambda: flatmin.SwitchEMA(model, decay=0.7),
        "LAWA": lambda: flatmin.LAWA(model),
        "MESA": lambda: flatmin.MESA(model, decay=0.7, statistics="fresh"),
    }[kind]()
    rank = problem.rank()
    average.refresh([problem.batch(step)[0] for step in range(2 + rank)])
    network = (average.average if kind == "MESA" else average).module
    return network.state_dict()


@pytest.mark.parametrize("kind", ["EMA", "SwitchEMA", "LAWA", "MESA"])
def test_fresh_statistics_are_the_mean_over_the_batches_of_all_ranks(kind):
    ours, theirs = run_ranks(refreshed, 2, kind)
    problem.assert_same(list(ours.values()), list(theirs.values()))
    layer = problem.network(norm=True)[0]
    shares = [[problem.batch(step)[0].chunk(2)[rank] for step in range(2 + rank)] for rank in range(2)]
    means = torch.stack([layer(x).mean(dim=0) for rank in shares for x in rank])
    torch.testing.assert_close(ours["1.running_mean"], means.mean(dim=0).detach())


def on_the_batch() -> tuple[list[torch.Tensor], torch.Tensor]:
    model = problem.replicated(norm=True)
    mesa = flatmin.MESA(model, coefficient=5.0, decay=0.7, start_epoch=0, statistics="batch", fraction=0.5)
    train(model, mesa, attached=True)
    return list(mesa.average.module.state_dict().values()), mesa(model(problem.batch(9)[0]), problem.batch(9)[0])


def test_a_target_with_the_batchs_own_statistics_keeps_ranks_alike():
    (ours, loss), (theirs, other) = run_ranks(on_the_batch, 2)
    problem.assert_same(ours, theirs)
    assert loss > 0
    assert other > 0
    assert loss != other  # each has its own share
