"""The methods against pytorch-optimizer's, step by step, where the two agree on the rule."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import flatmin
from flatmin.optim import Elementwise, RhoByLR

peer = pytest.importorskip("pytorch_optimizer")
from pytorch_optimizer.lr_scheduler.proportion import ProportionScheduler  # noqa: E402
from pytorch_optimizer.optimizer import sam as peers  # noqa: E402

STEPS = 100
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=generator).double(), torch.randint(3, (16,), generator=generator)


def closure_of(model, optimizer, step):
    x, y = batch(step)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def distances(make_ours, make_theirs, network=network) -> list[float]:
    """How far the weights are from one another after each step; theirs wants the first gradient beforehand."""
    ours, theirs = network(), network()
    optimizer, other = make_ours(ours), make_theirs(theirs)
    found = []
    for step in range(STEPS):
        optimizer.step(closure_of(ours, optimizer, step))
        closure = closure_of(theirs, other, step)
        closure()
        other.step(closure)
        found.append(
            max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        )
    return found


def sgd(model):
    return torch.optim.SGD(model.parameters(), **SGD)


# The peer keeps the norm of the first gradient in float32, hence 1e-6.
AGREE = {
    "SAM": (
        lambda m: flatmin.SAM(sgd(m), rho=0.5),
        lambda m: peer.SAM(m.parameters(), torch.optim.SGD, rho=0.5, **SGD),
    ),
    "SAM around AdamW": (
        lambda m: flatmin.SAM(torch.optim.AdamW(m.parameters(), lr=0.01), rho=0.5),
        lambda m: peer.SAM(m.parameters(), torch.optim.AdamW, rho=0.5, lr=0.01),
    ),
    "FriendlySAM": (
        lambda m: flatmin.FriendlySAM(sgd(m), rho=0.5, sigma=0.8, lam=0.7),
        lambda m: peer.FriendlySAM(m.parameters(), torch.optim.SGD, rho=0.5, sigma=0.8, lmbda=0.7, **SGD),
    ),
    "FriendlySAM, sigma 1": (
        lambda m: flatmin.FriendlySAM(sgd(m), rho=0.5, sigma=1.0, lam=0.9),
        lambda m: peer.FriendlySAM(m.parameters(), torch.optim.SGD, rho=0.5, **SGD),
    ),
    "FriendlySAM with ASAM's scaling": (
        lambda m: flatmin.FriendlySAM(sgd(m), rho=0.5, sigma=1.0, lam=0.9, scaling=Elementwise(0)),
        lambda m: peer.FriendlySAM(m.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **SGD),
    ),
    # Theirs scales every tensor, biases too, and has no eta.
    "ASAM": (
        lambda m: flatmin.ASAM(sgd(m), rho=0.5, eta=0),
        lambda m: peer.SAM(m.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **SGD),
    ),
}


@pytest.mark.parametrize("name", AGREE)
def test_steps_equal_the_peers(name):
    found = distances(*AGREE[name], lambda: network(bias="ASAM" not in name))
    assert max(found) < 1e-5
    assert max(found[:5]) < 1e-6


def test_asam_differs_on_biases_as_documented():
    assert max(distances(*AGREE["ASAM"])) > 1e-3


def test_gsam_steps_equal_the_peers_with_rho_tied_to_the_learning_rate():
    ours, theirs = network(), network()
    base, other_base = sgd(ours), sgd(theirs)
    schedulers = [CosineAnnealingLR(optimizer, STEPS, eta_min=0.01) for optimizer in (base, other_base)]
    optimizer = flatmin.GSAM(base, rho=RhoByLR(0.5, 0.1, lr_max=0.1, lr_min=0.01), alpha=0.4)
    proportion = ProportionScheduler(schedulers[1], max_lr=0.1, min_lr=0.01, max_value=0.5, min_value=0.1)
    other = peers.GSAM(theirs.parameters(), other_base, theirs, proportion, alpha=0.4)
    for step in range(STEPS):
        optimizer.step(closure_of(ours, optimizer, step))
        x, y = batch(step)
        other.set_closure(F.cross_entropy, x, y)
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        other.update_rho_t()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def look(model, **more):
    return flatmin.LookSAM(sgd(model), rho=0.5, k=4, alpha=0.7, **more)


def their_look(model):
    return peer.LookSAM(model.parameters(), torch.optim.SGD, rho=0.5, k=4, alpha=0.7, **SGD)


class OneTensor(nn.Module):
    """Where there is one tensor, a projection of each is one of all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, x):
        return torch.tanh(x) @ self.weight.t()


def test_looksam_steps_equal_the_peers_on_a_single_tensor():
    assert max(distances(look, their_look, OneTensor)) < 1e-5


def test_looksam_differs_on_several_tensors_as_documented():
    found = distances(look, their_look)
    assert found[0] < 1e-6  # the first step is SAM's in both
    assert max(found) > 1e-3
