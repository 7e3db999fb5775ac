"""What the comparison with pytorch-optimizer counts."""

import pytest
import torch
from torch import nn

pytest.importorskip("pytorch_optimizer")
from benchmarks import peers

PASSES = {"LookSAM": 1.2, "MSAM": 1, "S2SAM": 1}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("flatmin", n) for n in peers.OURS), *(("peer", n) for n in peers.THEIRS)]
)
def test_passes_are_counted_and_weights_move(kind, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    step = peers.make_step(kind, name, model, torch.randn(8, 4), torch.randint(3, (8,)))
    assert peers.passes(step, model) == (PASSES.get(name, 2) if kind == "flatmin" else 2)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("kind", ["flatmin", "flatmin, foreach", "peer", "peer, foreach"])
def test_without_passes_the_step_is_that_of_the_gradients_given(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    step = peers.make_step(kind, "SAM", model, torch.randn(8, 4), torch.randint(3, (8,)), no_passes=True)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    step()
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(weight - parameter, peers.SGD["lr"] * parameter.grad, atol=1e-7, rtol=1e-4)
    assert peers.passes(step, model) == 0


def test_gsam_of_both_sides_makes_the_same_steps():
    torch.manual_seed(0)
    x, y, models = torch.randn(8, 4), torch.randint(3, (8,)), []
    for kind in ("flatmin", "peer"):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
        step = peers.make_step(kind, "GSAM", models[-1], x, y)
        for _ in range(5):
            step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
