"""Lightning with two processes: SAM, SAF and MESA are those of one process, written out by hand, over both batches."""

import os
import socket
import warnings

import pytest

pytest.importorskip("lightning")

import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader

import flatmin
from tests.distributed._spawn import run_ranks
from tests.integrations._lightning import EPOCHS, data, network

RANKS, BATCH = 2, 8


def trained(port):
    """Trains in all cases, one after another; returns the weights, and the indices of each call of training_step."""
    warnings.simplefilter("ignore")
    from flatmin.integrations.lightning import SharpnessAware, TrajectoryLoss
    from tests.integrations._lightning import Net, fit

    rank = distributed.get_rank()
    os.environ.update(
        TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE="2"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0")

    class Noting(Net):
        def __init__(self, kind, **arguments):
            super().__init__(**arguments)
            self.kind, self.noted = kind, []

        def training_step(self, batch, batch_idx):
            (number, x), y = batch[:2], batch[2]
            self.noted.append(number.tolist())
            logits = self.net(x)
            penalty = self.saf(logits) if self.kind == "saf" else self.mesa(logits, x) if self.kind == "mesa" else 0
            return F.cross_entropy(logits, y) + penalty

    class Numbered(torch.utils.data.Dataset):
        def __len__(self):
            return 70

        def __getitem__(self, i):
            return i, *data()[i]

    loss = {"coefficient": 1.0, "start_epoch": 0}
    mesa = {"network": "net", "decay": 0.9, **loss}
    cases = {
        "rank": ("", SharpnessAware(flatmin.SAM, rho=0.05), 2),
        "global": ("", SharpnessAware(flatmin.SAM, rho=0.05, norm="global"), 2),
        "rank, one batch": ("", SharpnessAware(flatmin.SAM, rho=0.05), 1),
        "saf": ("saf", TrajectoryLoss(flatmin.SAF(70, 10, lag=1, **loss)), 1),
        "saf, sharded": (
            "saf",
            TrajectoryLoss(flatmin.SAF, num_samples=70, num_classes=10, lag=1, sharing="shard", **loss),
            1,
        ),
        "mesa": ("mesa", TrajectoryLoss(flatmin.MESA, **mesa), 2),
    }
    results = {}
    for case, (kind, callback, accumulate) in cases.items():
        module = Noting(kind, net=network(norm=kind == "mesa"))
        dataset = flatmin.indexed(Numbered()) if kind == "saf" else Numbered()
        batches = DataLoader(dataset, BATCH, shuffle=True)
        options = {"accumulate_grad_batches": accumulate, "devices": RANKS, "strategy": "ddp"}
        run = fit(module, callback, batches=batches, **options)
        assert run.world_size == RANKS
        state = run._checkpoint_connector.dump_checkpoint()
        results[case] = (
            {name: value.clone() for name, value in module.net.state_dict().items()},
            module.noted,
            list(state["callbacks"]),
        )
        if kind == "mesa":
            average = callback.loss.average.module.state_dict()
            results["average"] = {name: value.clone() for name, value in average.items()}, [], []
    return results


@pytest.fixture(scope="module")
def results():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(trained, RANKS, port, timeout=150)


CASES = ("rank", "global", "rank, one batch", "saf", "saf, sharded", "mesa", "average")


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_alike(results, case):
    ours, theirs = (each[case][0] for each in results)
    trained = {name for name, _ in network(norm=True).named_parameters()}
    alike = ours.keys() if case == "average" else trained & ours.keys()  # DDP sends statistics before the next pass
    assert all(torch.equal(ours[name], theirs[name]) for name in alike)


def steps(noted, accumulate, passes):
    """For each step the micro-batches of both ranks: of each a list of tensors of indices."""
    per_epoch = len(noted[0]) // EPOCHS
    for epoch in range(EPOCHS):
        calls = [each[epoch * per_epoch : (epoch + 1) * per_epoch] for each in noted]
        while calls[0]:
            left = len(calls[0]) // passes
            count = min(accumulate, left)
            for each in calls:
                assert each[:count] == each[count * (passes - 1) : count * passes]  # the second pass has the same
            yield epoch, [[torch.tensor(part) for part in each[:count]] for each in calls]
            calls = [each[count * passes :] for each in calls]


@pytest.mark.parametrize("case", ["rank", "global", "rank, one batch"])
def test_sam_is_that_of_one_process(results, case):
    accumulate = 1 if "one" in case else 2
    noted = [each[case][1] for each in results]
    x, y = (tensor[:70] for tensor in data().tensors)
    net = network()
    weights = list(net.parameters())
    base = torch.optim.SGD(weights, lr=0.1, momentum=0.9)

    def gradient(parts):
        losses = sum(F.cross_entropy(net(x[index]), y[index]) for index in parts) / accumulate
        return torch.autograd.grad(losses, weights)

    for _, ranks in steps(noted, accumulate, 2):
        first = [gradient(parts) for parts in ranks]
        if case == "global":
            first = [[(a + b) / 2 for a, b in zip(*first, strict=True)]] * 2
        second = []
        for direction, parts in zip(first, ranks, strict=True):
            norm = torch.sqrt(sum((g**2).sum() for g in direction))
            kept = [weight.detach().clone() for weight in weights]
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
    got = results[0][case][0]
    assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in net.state_dict().items())


@pytest.mark.parametrize("case", ["saf", "saf, sharded"])
def test_saf_compares_what_any_rank_recorded(results, case):
    noted = [each[case][1] for each in results]
    x, y = (tensor[:70] for tensor in data().tensors)
    net = network()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    saf = flatmin.SAF(70, 10, lag=1, coefficient=1.0, start_epoch=0)
    total = 0.0
    for epoch, ranks in steps(noted, 1, 1):
        saf.set_epoch(epoch)
        index = torch.cat([parts[0] for parts in ranks])
        logits = net(x[index])
        penalty = saf(logits, index)
        total += float(penalty.detach())
        base.zero_grad()
        (F.cross_entropy(logits, y[index]) + penalty).backward()
        base.step()
    assert total > 0
    got = results[0][case][0]
    assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in net.state_dict().items())
    assert results[1][case][2] == results[0][case][2] != []  # asked for on every rank, or shards would wait for ever


def test_the_weights_moved(results):
    for case in CASES[:-1]:
        start = network(norm=case == "mesa").state_dict()
        assert any((results[0][case][0][name] - start[name]).abs().max() > 1e-2 for name in start)
