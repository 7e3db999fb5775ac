"""The measures of SAM's kind against their definitions, in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.sharpness import Objective, average_sharpness, sam_sharpness


def oracle(model, x, y, *, rho, eta=None, logits=lambda z: z):
    """Equations 3 and 4, parameter by parameter; ASAM's where there is an eta."""
    model = copy.deepcopy(model).eval()
    loss = F.cross_entropy(logits(model(x)), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        factors = [p.abs() + eta if eta is not None and p.dim() > 1 else torch.ones_like(p) for p in model.parameters()]
        norm = math.sqrt(sum(float((t * g).pow(2).sum()) for t, g in zip(factors, grads, strict=True)))
        for p, t, g in zip(model.parameters(), factors, grads, strict=True):
            p += rho * t * t * g / (norm + 1e-12)
        return float(F.cross_entropy(logits(model(x)), y)) - loss.item()


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
@pytest.mark.parametrize("rho", [0.05, 0.7])
def test_it_is_equations_3_and_4_on_all_batches(network, batches, whole, rho, eta):
    options = {} if eta is None else {"adaptive": True, "eta": eta}
    found = sam_sharpness(Objective(network, F.cross_entropy, batches), rho=rho, **options)
    assert found.value == pytest.approx(oracle(network, *whole[0], rho=rho, eta=eta), rel=1e-9)
    loss = F.cross_entropy(network(whole[0][0]), whole[0][1])
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]).norm()
    assert found.gradient_norm == pytest.approx(float(norm), rel=1e-12)


def test_per_batch_is_the_mean_of_the_batches_own(network, batches):
    found = sam_sharpness(Objective(network, F.cross_entropy, batches), per_batch=True)
    wanted = sum(len(y) * oracle(network, x, y, rho=0.05) for x, y in batches) / 10
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert found.value != pytest.approx(sam_sharpness(Objective(network, F.cross_entropy, batches)).value, rel=1e-2)


def test_for_small_rho_it_is_rho_times_the_gradient(network, batches):
    found = sam_sharpness(Objective(network, F.cross_entropy, batches), rho=1e-6)
    assert found.value == pytest.approx(1e-6 * found.gradient_norm, rel=1e-4)


def test_rescaling_layers_changes_plain_sharpness_and_not_adaptive(batches):
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 5
        scaled[2].weight /= 5
    plain = [sam_sharpness(Objective(m, F.cross_entropy, batches)).value for m in (model, scaled)]
    adaptive = [
        sam_sharpness(Objective(m, F.cross_entropy, batches), adaptive=True, eta=0).value for m in (model, scaled)
    ]
    assert plain[1] > 2 * plain[0]
    assert adaptive[0] == pytest.approx(adaptive[1], rel=1e-9)


def test_logits_are_centred_and_of_length_one(network, batches, whole):
    def unit(z):
        z = z - z.mean(dim=1, keepdim=True)
        return z / z.pow(2).sum(dim=1, keepdim=True).sqrt()

    found = sam_sharpness(Objective(network, F.cross_entropy, batches, normalise_logits=True))
    assert found.value == pytest.approx(oracle(network, *whole[0], rho=0.05, logits=unit), rel=1e-9)


def test_softer_predictions_change_raw_loss_and_not_normalised(network, batches):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.network, self.factor = network, factor

        def forward(self, x):
            return self.factor * self.network(x)

    raw = [sam_sharpness(Objective(Scaled(f), F.cross_entropy, batches)).value for f in (1, 4)]
    same = [sam_sharpness(Objective(Scaled(f), F.cross_entropy, batches, normalise_logits=True)).value for f in (1, 4)]
    assert raw[1] > 1.5 * raw[0]
    assert same[0] == pytest.approx(same[1], rel=1e-9)


class Bowl(nn.Module):
    """Two weights; the loss is a bowl, four times as steep along the second."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, 0.05], dtype=torch.float64))

    def forward(self, x):
        return x + (self.weight**2 * torch.tensor([0.5, 2.0], dtype=torch.float64)).sum()


BOWL = [(torch.zeros(1, dtype=torch.float64), torch.zeros(1))]


def rise(logits, y):
    return logits.mean()


def test_more_steps_come_to_the_worst_case():
    angle = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    ends = torch.stack([0.3 + angle.cos(), 0.05 + angle.sin()])
    worst = float((ends.square() * torch.tensor([[0.5], [2.0]], dtype=torch.float64)).sum(0).max())
    start = 0.5 * 0.09 + 2 * 0.0025
    found = [sam_sharpness(Objective(Bowl(), rise, BOWL), rho=1.0, ascent_steps=steps).value for steps in (1, 2, 30)]
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(worst - start, rel=1e-6)
    assert found[0] < 0.9 * (worst - start)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_case_of_a_bowl_is_half_its_trace(adaptive):
    found = average_sharpness(Objective(Bowl(), rise, BOWL), rho=0.1, adaptive=adaptive, directions=1000)
    wanted = 0.5 * 0.1**2 * (1 + 4)  # a vector of one dimension is moved as it is, adaptive or not
    assert found.value == pytest.approx(wanted, abs=4 * found.standard_error)
    assert 0 < found.standard_error < 0.05 * wanted


def test_the_average_case_goes_by_the_size_of_each_weight():
    class Matrix(Bowl):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(self.weight.detach()[None])

    found = average_sharpness(Objective(Matrix(), rise, BOWL), rho=0.1, eta=0.0, directions=1000)
    wanted = 0.5 * 0.1**2 * (0.3**2 + 4 * 0.05**2)
    assert found.value == pytest.approx(wanted, abs=4 * found.standard_error)


def test_the_average_case_is_below_the_worst_at_the_same_distance(network, batches):
    average = average_sharpness(Objective(network, F.cross_entropy, batches), rho=0.05, adaptive=False)
    distance = 0.05 * math.sqrt(sum(p.numel() for p in network.parameters()))
    worst = sam_sharpness(Objective(network, F.cross_entropy, batches), rho=distance, ascent_steps=10)
    assert average.value < worst.value
