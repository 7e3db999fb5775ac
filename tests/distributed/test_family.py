"""The SAM family on several ranks: each is what one process does, its state is the same on all, and FSDP2."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flatmin
from flatmin.optim import Adaptive, Every, Sometimes
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks

STEPS = 6
FAMILY = {
    "SAM": lambda base: flatmin.SAM(base, rho=0.5, norm="global"),
    "ASAM": lambda base: flatmin.ASAM(base, rho=0.5, norm="global"),
    "GSAM": lambda base: flatmin.GSAM(base, rho=0.5, alpha=0.6),
    "LookSAM": lambda base: flatmin.LookSAM(base, rho=0.5, k=3),
    "FriendlySAM": lambda base: flatmin.FriendlySAM(base, rho=0.5, sigma=0.9, lam=0.7),
    "MSAM": lambda base: flatmin.MSAM(base, rho=0.5),
    "S2SAM": lambda base: flatmin.S2SAM(base, rho=0.5),
    "SAM clipped": lambda base: flatmin.SAM(base, rho=0.5, norm="global", max_norm=0.1),
    # A step that does not pay has the whole batch's gradient, whatever the norm; and all ranks choose the same.
    "SAM seldom": lambda base: flatmin.SAM(base, rho=0.5, norm="rank", when=lambda step: False),
    "SAM by the gradient": lambda base: flatmin.SAM(base, rho=0.5, norm="rank", when=Adaptive(STEPS)),
}


def train(name: str, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Weights, what the method remembers, and how often the closure was called."""
    model = problem.network()
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    network = nn.parallel.DistributedDataParallel(model) if kind == "replicated" else model
    optimizer = FAMILY[name](problem.sgd(model))
    calls = []
    for step in range(STEPS):

        def closure(step=step) -> torch.Tensor:
            calls.append(step)
            optimizer.zero_grad()
            loss = problem.loss_of(network, step)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    kept = [t for entries in optimizer.state_dict()["flatmin"]["state"].values() for t in entries.values()]
    kept = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in kept]
    return problem.weights(model), kept, len(calls)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_ranks_equal_one(name, kind):
    weights, kept, calls = train(name, "alone")
    (ours, own, made), (theirs, others, also) = run_ranks(train, 2, name, kind)
    problem.assert_same(ours, theirs)
    problem.assert_same(own, others)
    problem.assert_close(ours, weights)
    problem.assert_close(own, kept)
    assert made == also == calls


def seldom(when: str) -> list[torch.Tensor]:
    model = problem.replicated()
    whens = {"every": Every(2), "sometimes": Sometimes(0.5)}
    optimizer = flatmin.SAM(problem.sgd(model), rho=0.5, norm="rank", when=whens[when])
    for step in range(STEPS):

        def closure(step=step) -> torch.Tensor:
            optimizer.zero_grad()
            (loss := problem.loss_of(model, step)).backward()
            return loss.detach()

        optimizer.step(closure)
    return problem.weights(model)


@pytest.mark.parametrize("when", ["every", "sometimes"])
def test_ranks_that_perturb_by_themselves_stay_alike_where_some_steps_do_not_pay(when):
    ours, theirs = run_ranks(seldom, 2, when)
    problem.assert_same(ours, theirs)
