"""Logit squeezing against its formula, its two limits, and what it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.losses import logit_squeezing, trajectory_loss

B, C = 6, 4
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def some_logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    logits = 3 * torch.randn(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits.to(dtype).requires_grad_()


def oracle(rows: list[list[float]], coefficient: float, temperature: float) -> tuple[float, list[list[float]]]:
    """Coefficient T^2 / B sum_i KL(u || q_i), and its gradient coefficient T / B (q - u), with q = softmax(z / T)."""
    loss, gradient = 0.0, []
    for row in rows:
        exponentials = [math.exp((value - max(row)) / temperature) for value in row]
        q = [value / sum(exponentials) for value in exponentials]
        u = 1 / len(row)
        loss += coefficient * temperature**2 / len(rows) * sum(u * (math.log(u) - math.log(each)) for each in q)
        gradient.append([coefficient * temperature / len(rows) * (each - u) for each in q])
    return loss, gradient


@pytest.mark.parametrize("coefficient", [0.3, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_value_and_gradient_equal_the_oracle(coefficient, temperature):
    logits = some_logits()
    loss = logit_squeezing(logits, coefficient=coefficient, temperature=temperature)
    loss.backward()
    value, gradient = oracle(logits.tolist(), coefficient, temperature)
    torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-11, atol=1e-14)


def test_gradient_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda z: logit_squeezing(z, coefficient=0.7, temperature=2.0), some_logits())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_trajectory_loss_to_zeros_with_the_defaults_of_the_command(dtype):
    logits, twin = some_logits(dtype), some_logits(dtype)
    loss = flatmin.logit_squeezing(logits)
    expected = 0.8 * trajectory_loss(twin, torch.zeros_like(twin), temperature=5.0)
    assert torch.equal(loss, expected)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward(), expected.backward()
    assert torch.equal(logits.grad, twin.grad)
    assert logits.grad.dtype == dtype
    exact, _ = oracle(logits.double().tolist(), 0.8, 5.0)
    torch.testing.assert_close(loss.item(), exact, rtol=1e-5, atol=0)


def test_at_temperature_1_the_sum_with_the_cross_entropy_is_label_smoothing():
    logits, y, coefficient = some_logits(), torch.arange(B) % C, 0.25
    ours = F.cross_entropy(logits, y) + logit_squeezing(logits, coefficient=coefficient, temperature=1.0)
    smoothed = F.cross_entropy(logits, y, label_smoothing=coefficient / (1 + coefficient))
    torch.testing.assert_close(ours, (1 + coefficient) * smoothed - coefficient * math.log(C))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, smoothed)]
    torch.testing.assert_close(gradients[0], (1 + coefficient) * gradients[1])


def test_at_a_high_temperature_it_is_half_the_variance_of_the_logits():
    logits = some_logits()
    loss = logit_squeezing(logits, coefficient=1.0, temperature=1e4)
    torch.testing.assert_close(loss, logits.var(dim=1, correction=0).mean() / 2, rtol=1e-3, atol=0)


def test_equal_logits_cost_nothing_and_a_constant_added_to_all_changes_nothing():
    assert logit_squeezing(torch.full((2, 3), 7.0)) == pytest.approx(0, abs=1e-5)
    logits = some_logits()
    torch.testing.assert_close(logit_squeezing(logits + 11), logit_squeezing(logits))
    assert logit_squeezing(logits, coefficient=0.0) == 0


def test_a_step_down_its_gradient_pulls_the_logits_together():
    logits = some_logits()
    logit_squeezing(logits).backward()
    after = logits.detach() - logits.grad
    assert (after.std(dim=1) < logits.std(dim=1)).all()


def test_autocast_changes_nothing():
    logits = some_logits(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = logit_squeezing(logits)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, logit_squeezing(logits))


def test_empty_batch_costs_nothing():
    logits = torch.zeros(0, C, requires_grad=True)
    loss = logit_squeezing(logits)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("value", [-math.inf, -1e9])
def test_a_class_masked_out_makes_the_loss_huge_and_finite(value):
    logits = some_logits(torch.float32).detach()
    logits[:, 2] = value
    logits.requires_grad_()
    loss = logit_squeezing(logits)
    loss.backward()
    assert torch.equal(loss, 0.8 * trajectory_loss(logits, torch.zeros_like(logits), temperature=5.0))
    assert 1e8 < loss.item() < math.inf
    assert logits.grad.isfinite().all()
    assert logit_squeezing(logits[:, [0, 1, 3]]) < 10  # the way out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": -0.1}, "^coefficient must be .* >= 0, got -0.1"),
        ({"coefficient": float("nan")}, "^coefficient must be .* got nan"),
        ({"temperature": 0}, "^temperature must be .* > 0, got 0"),
        ({"temperature": "hot"}, "^temperature must be .* got 'hot'"),
        ({"logits": [[0.0, 1.0]]}, "^logits must be a tensor, got list"),
        ({"logits": torch.zeros(3)}, r"^logits must be floating and of shape .* got torch.float32 of shape \(3,\)"),
        ({"logits": torch.zeros(3, 2, 1)}, r"^logits must be floating and of shape .*\(3, 2, 1\)"),
        ({"logits": torch.zeros(3, 1)}, r"^logits must .*\(3, 1\); give a binary problem two logits"),
        ({"logits": torch.zeros(3, 2).long()}, "^logits must be floating .* got torch.int64"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        logit_squeezing(**{"logits": torch.zeros(3, 2), **arguments})


def test_arguments_are_given_by_name():
    with pytest.raises(TypeError):
        logit_squeezing(torch.zeros(3, 2), 0.8)
