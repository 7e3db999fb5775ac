"""The formula against its transcription, and its numerical promises."""

import pytest
import torch

from flatmin.errors import InvalidArgumentError
from flatmin.losses import trajectory_loss
from tests.reference import oracles

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def pair(batch: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), target


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("mask", [None, [True, False, True, True, False, False]])
def test_value_and_gradient_equal_the_oracle(temperature, mask):
    logits, target = pair()
    loss = trajectory_loss(logits, target, temperature=temperature, mask=None if mask is None else torch.tensor(mask))
    loss.backward()
    targets = [row if mask is None or mask[i] else None for i, row in enumerate(target.tolist())]
    value, gradient = oracles.trajectory(targets, logits.tolist(), coefficient=1, temperature=temperature)
    torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-11, atol=1e-14)


def test_gradient_passes_gradcheck():
    logits, target = pair()
    mask = torch.tensor([True, False] * 3)
    assert torch.autograd.gradcheck(lambda z: trajectory_loss(z, target, temperature=5.0, mask=mask), logits)


def test_size_of_the_gradient_does_not_depend_on_the_temperature():
    # the divergence is that of logits / T, so T**2 is what makes the loss of T-fold logits T**2 times as large
    logits, target = pair()
    once = trajectory_loss(logits, target, temperature=1.0)
    fivefold = trajectory_loss(5 * logits, 5 * target, temperature=5.0)
    torch.testing.assert_close(fivefold, 25 * once, rtol=1e-12, atol=0)


def test_mean_is_over_the_batch_and_not_over_the_mask():
    logits, target = pair()
    mask = torch.arange(6) < 2
    masked = trajectory_loss(logits, target, temperature=5.0, mask=mask)
    torch.testing.assert_close(masked, trajectory_loss(logits[:2], target[:2], temperature=5.0) * 2 / 6)
    assert trajectory_loss(logits, target, temperature=5.0, mask=torch.zeros(6, dtype=torch.bool)) == 0


def test_target_is_the_first_argument_of_the_divergence_and_gets_no_gradient():
    logits, target = pair()
    target.requires_grad_()
    forward = trajectory_loss(logits, target, temperature=1.0)
    assert not torch.isclose(forward, trajectory_loss(target, logits, temperature=1.0))
    forward.backward()
    assert target.grad is None
    with pytest.raises(InvalidArgumentError, match=r"logits come first, and target\.detach\(\) second"):
        trajectory_loss(logits.detach(), target, temperature=1.0)
    assert not trajectory_loss(logits.detach(), target.detach(), temperature=1.0).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_finite_for_the_most_extreme_logits(dtype, temperature):
    most = torch.finfo(dtype).max
    rows = [[0.0, 1000.0, 0.0], [most, -most, 0.0], [-most, -most, -most], [most, most, most], [-most, most, -most]]
    for shift in range(len(rows)):
        logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
        target = torch.tensor(rows[shift:] + rows[:shift], dtype=dtype)
        loss = trajectory_loss(logits, target, temperature=temperature)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gap_of_a_thousand_is_exact(dtype):
    # p = (1, 0), log q = (-200, 0), so that T**2 * KL = 25 * 200
    logits, target = torch.tensor([[[0.0, 1000.0]], [[1000.0, 0.0]]], dtype=dtype)
    assert trajectory_loss(logits, target, temperature=5.0).item() == pytest.approx(5000, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_computes_in_float32_at_least_and_in_float64_for_float64(dtype, target_dtype):
    logits, target = pair()
    logits, target = logits.detach().to(dtype), target.to(target_dtype)
    loss = trajectory_loss(logits, target, temperature=5.0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = trajectory_loss(logits.double(), target.double(), temperature=5.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_autocast_changes_nothing():
    logits, target = (tensor.detach().bfloat16() for tensor in pair())
    with torch.autocast("cpu", torch.bfloat16):
        inside = trajectory_loss(logits, target, temperature=5.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, trajectory_loss(logits, target, temperature=5.0))


def test_empty_batch_costs_nothing():
    assert trajectory_loss(torch.zeros(0, 3), torch.zeros(0, 3), temperature=5.0) == 0
