"""DP-SAT on two processes: the ranks are alike, it is DP-SAT by hand over both batches, and epsilon is DP-SGD's."""

import itertools

import pytest

pytest.importorskip("opacus")

import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.distributed._spawn import run_ranks
from tests.integrations._opacus import B, data, difference, flat, network, quiet, sgd

CASES = [(mode, direction) for mode in ("hooks", "ghost") for direction in ("plain", "gradient", "step")]
STEPS = 4


def trained():
    """Trains in all cases, one after another; returns weights and epsilon, and what was drawn."""
    quiet()
    from opacus import PrivacyEngine
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel

    from flatmin.integrations.opacus import DPSAT

    dataset, results = TensorDataset(*data(), torch.arange(len(data()[0]))), {}
    for mode, direction in CASES:
        net, engine = network(), PrivacyEngine(accountant="rdp")
        wrapped = DifferentiallyPrivateDistributedDataParallel(net)
        made = engine.make_private(
            module=wrapped,
            optimizer=sgd(wrapped),
            data_loader=DataLoader(dataset, B, sampler=DistributedSampler(dataset)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            noise_generator=torch.Generator().manual_seed(3),
        )
        module, optimizer, loader = made[0], made[1], made[-1]
        criterion = made[2] if len(made) == 4 else torch.nn.CrossEntropyLoss()
        if direction != "plain":
            DPSAT(module=module, optimizer=optimizer, rho=0.5, direction=direction)
        torch.manual_seed(5 + distributed.get_rank())
        drawn = []
        while len(drawn) < STEPS:
            for x, y, index in loader:
                optimizer.zero_grad()
                criterion(module(x), y).backward()
                optimizer.step()
                drawn.append(index.tolist())
                if len(drawn) == STEPS:
                    break
        epsilon = engine.accountant.get_epsilon(1e-5, alphas=[2, 3, 4, 6, 8])
        results[mode, direction] = flat(net), epsilon, drawn
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(trained, 2, timeout=150)


def by_hand(direction, drawn):
    """On one process, sample by sample."""
    x, y = data()
    net = network()
    weights, base, last = list(net.parameters()), sgd(net), None
    noise = torch.Generator().manual_seed(3)
    for indices in zip(*drawn, strict=True):
        kept = [weight.detach().clone() for weight in weights]
        if last is not None:
            norm = torch.cat([tensor.flatten() for tensor in last]).norm()
            with torch.no_grad():
                for weight, tensor in zip(weights, last, strict=True):
                    weight += 0.5 * tensor / norm
        total = [torch.zeros_like(weight) for weight in weights]
        for index in itertools.chain(*indices):
            part = torch.autograd.grad(F.cross_entropy(net(x[index : index + 1]), y[index : index + 1]), weights)
            norm = float(torch.cat([tensor.flatten() for tensor in part]).norm())
            for tensor, gradient in zip(total, part, strict=True):
                tensor += min(1.0, 1.0 / (norm + 1e-6)) * gradient
        with torch.no_grad():
            for weight, tensor, value in zip(weights, total, kept, strict=True):
                weight.copy_(value)
                weight.grad = (tensor + torch.normal(0, 1.0, weight.shape, generator=noise)) / (2 * B)  # B a rank
        last = [weight.grad.clone() for weight in weights]
        base.step()
        if direction == "step":
            last = [old - new.detach() for old, new in zip(kept, weights, strict=True)]
    return flat(net)


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_alike_and_private_as_dpsgd(results, case):
    ours, theirs = (each[case] for each in results)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1] == results[0][case[0], "plain"][1]
    if case[1] != "plain":
        assert difference(ours[0], results[0][case[0], "plain"][0]) > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "plain"])
def test_it_is_that_of_one_process(results, case):
    drawn = [each[case][2] for each in results]
    assert difference(results[0][case][0], by_hand(case[1], drawn)) < 1e-6
