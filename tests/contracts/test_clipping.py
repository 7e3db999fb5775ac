"""The gradient that the base optimizer steps with is clipped, and no other."""

import pytest
import torch

from tests.contracts._optimizers import TRAINED, Training, assert_same

every = pytest.mark.parametrize("name", TRAINED)


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Without those of what stands still in the step."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def gradients(training: Training) -> list[torch.Tensor]:
    """What the base optimizer steps with, in the step after the first three."""
    training.step(3)
    found = []
    training.optimizer.base_optimizer.register_step_pre_hook(lambda *_: found.extend(gradients_of(training.model)))
    training.step()
    return found


@every
def test_it_equals_torchs_clipping_of_the_last_gradient(name):
    """Told of in the fourth step alone, so that both arrive there alike."""
    plain, clipped, weights = Training(name), Training(name), []
    expected = gradients(plain)
    clipped.step(3)
    clipped.each_pass = lambda: weights.append([p.detach().clone() for p in clipped.model.parameters()])
    clipped.optimizer.max_norm = 0.05
    found = []
    clipped.optimizer.base_optimizer.register_step_pre_hook(lambda *_: found.extend(gradients_of(clipped.model)))
    clipped.step()
    holders = [torch.nn.Parameter(gradient) for gradient in expected]
    for holder, gradient in zip(holders, expected, strict=True):
        holder.grad = gradient.clone()
    assert torch.nn.utils.clip_grad_norm_(holders, 0.05) > 0.05
    for ours, holder in zip(found, holders, strict=True):
        torch.testing.assert_close(ours, holder.grad, rtol=1e-9, atol=1e-12)
    again = Training(name)
    again.step(3)
    moved = []
    again.each_pass = lambda: moved.append([p.detach().clone() for p in again.model.parameters()])
    again.step()
    assert_same(weights, moved)  # the perturbation is of the gradient as it was


@every
def test_a_gradient_that_is_short_enough_is_left_alone(name):
    ours, plain = Training(name, max_norm=1e6), Training(name)
    assert ours.step(4) == plain.step(4)
    assert_same(ours.state(), plain.state())
