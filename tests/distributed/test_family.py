"""The SAM family on several ranks: each is what one process does, its state is the same on all, and FSDP2."""

import random

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional as F

import flatmin
from flatmin.optim import Adaptive, Every, Sometimes
from tests.contracts._optimizers import EVERY
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks
from tests.reference import oracles

STEPS = 6
FAMILY = {
    "SAM": lambda base: flatmin.SAM(base, rho=0.5, norm="global"),
    "ASAM": lambda base: flatmin.ASAM(base, rho=0.5, norm="global"),
    "GSAM": lambda base: flatmin.GSAM(base, rho=0.5, alpha=0.6),
    "LookSAM": lambda base: flatmin.LookSAM(base, rho=0.5, k=3),
    "FriendlySAM": lambda base: flatmin.FriendlySAM(base, rho=0.5, sigma=0.9, lam=0.7),
    "MSAM": lambda base: flatmin.MSAM(base, rho=0.5),
    "S2SAM": lambda base: flatmin.S2SAM(base, rho=0.5),
    # All samples: those that a rank would choose of its share are not those chosen of the whole.
    "ESAM": lambda base: flatmin.ESAM(base, rho=0.5, norm="global", gamma=1.0),
    "SAM clipped": lambda base: flatmin.SAM(base, rho=0.5, norm="global", max_norm=0.1),
    # A step without a second pass has the whole batch's gradient, whatever the norm; and all ranks choose the same.
    "SAM seldom": lambda base: flatmin.SAM(base, rho=0.5, norm="rank", when=lambda step: False),
    "SAM by the gradient": lambda base: flatmin.SAM(base, rho=0.5, norm="rank", when=Adaptive(STEPS)),
}


def test_none_is_left_out():
    assert set(EVERY) <= set(FAMILY)


def losses_of(model: nn.Module, step: int, keep: object, calls: list[int]) -> torch.Tensor:
    calls.append(step)
    x, y = problem.batch(step)
    return F.cross_entropy(model(x[keep]), y[keep], reduction="none")


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

        own = optimizer.per_sample_closure
        optimizer.step((lambda keep, step=step: losses_of(network, step, keep, calls)) if own else closure)
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


ESAM = {"rho": 0.5, "beta": 0.6, "gamma": 0.5}


def chosen(norm: str) -> list[torch.Tensor]:
    model = problem.replicated()
    optimizer = flatmin.ESAM(problem.sgd(model), norm=norm, **ESAM)
    for step in range(STEPS):
        optimizer.step(lambda keep, step=step: losses_of(model, step, keep, []))
    return problem.weights(model)


def each_rank_chooses(norm: str) -> list[torch.Tensor]:
    """ESAM's rule on the two halves of each batch: their own e or that of both, their own samples, the mean."""
    model = problem.network()
    names, weights = zip(*model.named_parameters(), strict=True)
    weights = [weight.detach() for weight in weights]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for step in range(STEPS):
        draw = random.Random(f"0:{step}")
        kept = [draw.random() < ESAM["beta"] for _ in weights]
        x, y = problem.batch(step)

        def losses(weights, samples, x=x, y=y):
            outputs = functional_call(model, dict(zip(names, weights, strict=True)), (x[samples],))
            return F.cross_entropy(outputs, y[samples], reduction="none")

        halves = torch.arange(problem.B).chunk(2)
        firsts = [oracles.autograd(lambda w, half=half: losses(w, half).mean())(weights) for half in halves]
        both = [sum(parts) / 2 for parts in zip(*firsts, strict=True)]
        gradients = []
        for half, first in zip(halves, firsts, strict=True):

            def gradient_of(samples, half=half, seen=both if norm == "global" else first):
                if len(samples) == len(half):
                    return lambda w: seen
                return oracles.autograd(lambda w: losses(w, half[list(samples)]).mean())

            def each(w, half=half):
                return losses(w, half).tolist()

            gradients.append(oracles.esam_gradient(weights, gradient_of, each, kept, **ESAM)[0] if any(kept) else first)
        mean = [sum(parts) / 2 for parts in zip(*gradients, strict=True)]
        rates = {"lr": [0.2] * len(weights), "momentum": 0.9, "weight_decay": [0.0] * len(weights)}
        weights, velocities = oracles.sgd(weights, velocities, mean, **rates)
    return weights


@pytest.mark.parametrize("norm", ["rank", "global"])
def test_with_esam_each_rank_chooses_of_its_own_samples(norm):
    ours, theirs = run_ranks(chosen, 2, norm)
    problem.assert_same(ours, theirs)
    problem.assert_close(ours, each_rank_chooses(norm))
    assert problem.differ(each_rank_chooses("rank"), each_rank_chooses("global"))
