"""Accelerate with two processes: SAM is that of one process, written out by hand, over both batches."""

import os
import warnings

import pytest

pytest.importorskip("accelerate")

import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader

import flatmin
from tests.distributed._spawn import run_ranks
from tests.integrations._accelerate import EPOCHS, data, difference, network, sgd

RANKS, BATCH, N = 2, 8, 70
CASES = [("rank", 1), ("global", 1), ("rank", 2), ("global", 2), ("rank", 3), ("MESA", 2)]


def trained():
    """Trains in all cases, one after another; returns the weights, and the indices of the micro-batches by epoch."""
    warnings.simplefilter("ignore")
    rank = distributed.get_rank()
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost")
    from accelerate import Accelerator
    from accelerate.state import GradientState

    from flatmin.integrations.accelerate import sharpness_aware

    x, y = data()
    results = {}
    for case, accumulate in CASES:
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        assert accelerator.num_processes == RANKS
        net = network()
        norm = case if case != "MESA" else "rank"
        loader = DataLoader(torch.arange(N), BATCH, shuffle=True)
        model, optimizer, loader = accelerator.prepare(net, flatmin.SAM(sgd(net), norm=norm), loader)
        mesa = flatmin.MESA(net, decay=0.9, coefficient=1.0, start_epoch=0)
        mesa.attach(optimizer)

        def loss(index, model=model, mesa=mesa if case == "MESA" else None):
            logits = model(x[index])
            found = F.cross_entropy(logits, y[index])
            return found if mesa is None else found + mesa(logits, x[index])

        with pytest.raises(flatmin.errors.InvalidArgumentError, match=r"model \(Sequential\) is not what"):
            sharpness_aware(accelerator, net, optimizer, loss=loss)
        step = sharpness_aware(accelerator, model, optimizer, loss=loss)
        seen = []
        for _ in range(EPOCHS):
            seen.append([])
            for index in loader:
                seen[-1].append(index.tolist())
                step(index)
        results[case, accumulate] = net.state_dict(), seen
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(trained, RANKS, timeout=150)


def by_hand(case, accumulate, seen):
    """SAM over the micro-batches of both ranks, on one process."""
    x, y = data()
    net = network()
    weights, base = list(net.parameters()), sgd(net)

    def gradient(parts):
        losses = sum(F.cross_entropy(net(x[index]), y[index]) for index in parts) / accumulate
        return torch.autograd.grad(losses, weights)

    for epoch in range(EPOCHS):
        count = len(seen[0][epoch])
        for start in range(0, count, accumulate):
            ranks = [each[epoch][start : start + accumulate] for each in seen]
            first = [gradient(parts) for parts in ranks]
            if case == "global":
                first = [[(a + b) / 2 for a, b in zip(*first, strict=True)]] * 2
            kept, second = [weight.detach().clone() for weight in weights], []
            for direction, parts in zip(first, ranks, strict=True):
                norm = torch.sqrt(sum((g**2).sum() for g in direction))
                with torch.no_grad():
                    for weight, g in zip(weights, direction, strict=True):
                        weight += 0.05 * g / (norm + 1e-12)
                second.append(gradient(parts))
                with torch.no_grad():
                    for weight, value in zip(weights, kept, strict=True):
                        weight.copy_(value)
            for weight, a, b in zip(weights, *second, strict=True):
                weight.grad = (a + b) / 2
            base.step()
    return net


@pytest.mark.parametrize("case", CASES[:-1])
def test_sam_is_that_of_one_process(results, case):
    seen = [each[case][1] for each in results]
    assert len(seen[0][0]) == 5  # an uneven end for 2 and for 3
    net, ours = by_hand(*case, seen), network()
    ours.load_state_dict(results[0][case][0])
    assert difference(ours, net) < 1e-6
    other = by_hand("global" if case[0] == "rank" else "rank", case[1], seen)
    assert difference(ours, other) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_alike(results, case):
    ours, theirs = (each[case][0] for each in results)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any((ours[name] - value).abs().max() > 1e-2 for name, value in network().state_dict().items())
