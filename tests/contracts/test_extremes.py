"""Gradients whose squares overflow, and weights too coarse for the perturbation."""

import warnings

import pytest
import torch

from flatmin.errors import FlatminWarning
from flatmin.optim import Elementwise
from flatmin.optim._foreach import global_norm, length, scaled_norm
from tests.contracts._optimizers import TRAINED, Training

LARGE = {torch.float32: 1e22, torch.bfloat16: 1e22, torch.float64: 1e170}


@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_a_norm_is_finite_wherever_the_elements_are(dtype, bad):
    tensors = [torch.full((3,), LARGE[dtype], dtype=dtype), torch.zeros(0, dtype=dtype), torch.ones(2)]
    expected = 3**0.5 * float(tensors[0][0])
    assert length(tensors) == pytest.approx(expected, rel=1e-6)
    assert not global_norm(tensors).isfinite()
    if bad is not None:
        tensors[0][1] = bad
        assert not scaled_norm(tensors).isfinite()
        assert not abs(length(tensors)) < float("inf")


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("options", [{}, {"max_norm": 1e-3}, {"scaling": Elementwise()}])
@pytest.mark.parametrize("large", [1e20, 1e25])
def test_a_finite_gradient_is_stepped_with_however_long(name, options, large):
    """Steps of a loss times a large number, by a learning rate divided by it, are those of the loss."""
    if name == "ASAM" and "scaling" in options:
        return
    losses, rate = [], 100.0 if "max_norm" in options else 0.1  # which no gradient is below
    for factor in (1.0, large):

        def base(model, factor=1.0 if "max_norm" in options else factor):
            return torch.optim.SGD(model.parameters(), lr=rate / factor, momentum=0.9)

        training = Training(name, dtype=torch.float32, base=base, **options)
        training.factor = dict.fromkeys(range(100), factor)
        losses.append([loss / factor for loss in training.step(5)])
        assert training.optimizer.skipped_steps == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]


def warned(training: Training, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        training.step(steps)
    return [str(warning.message) for warning in said if issubclass(warning.category, FlatminWarning)]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [1e-3, 3.0])
def test_weights_that_round_the_perturbation_away_are_warned_of_once(name, dtype, rho):
    training = Training(name, dtype=dtype)
    training.optimizer.rho = rho
    said = warned(training, 6)
    assert len(said) == (dtype == torch.bfloat16 and rho < 1)
    assert all("bfloat16" in text and "autocast" in text for text in said)
