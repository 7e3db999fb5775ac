"""Dropout: one mask for both passes of a step, and as many random numbers drawn as the base optimizer's one pass."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from flatmin.optim import Every
from tests.contracts._optimizers import CLOSED, TRAINED, Training, network, passes_of

TWO = [name for name in TRAINED if TRAINED[name].max_passes == 2]


def dropping(name: str, **options) -> tuple[Training, list[torch.Tensor]]:
    """A training with dropout, and the mask of each forward pass."""
    training, masks = Training(name, network(dropout=0.5), **options), []
    training.model[3].register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    return training, masks


@pytest.mark.parametrize("name", TWO)
def test_both_passes_have_the_same_mask_and_steps_have_others(name):
    training, masks = dropping(name)
    training.step(3 if name == "LookSAM" else 2)  # of which LookSAM's second has one pass
    assert torch.equal(masks[0], masks[1])  # ESAM's forward without gradient is the second
    assert not torch.equal(masks[-1], masks[0])
    assert 0.2 < masks[0].double().mean() < 0.8


@pytest.mark.parametrize("name", TWO)
def test_by_choice_they_differ(name):
    training, masks = dropping(name, same_randomness=False)
    training.step()
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_draws_what_one_pass_draws(name):
    training, _ = dropping(name)
    torch.manual_seed(5)
    training.step(4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in range(4):
        training.model(training.x)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("number", [1, 2])
def test_it_is_put_back_when_the_closure_raises(name, number):
    """To what the first pass has left, as with the base optimizer."""
    training, _ = dropping(name)
    torch.manual_seed(5)
    training.model(training.x)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    training.raises = number
    with pytest.raises(RuntimeError, match="in the closure"):
        training.step()
    assert torch.equal(torch.get_rng_state(), expected)


def test_steps_that_do_not_pay_and_loops_without_a_closure_draw_alike():
    states = []
    for way in (Training.step, Training.loop):
        training, masks = dropping("SAM", when=Every(2))
        torch.manual_seed(5)
        way(training, 4)
        states.append((torch.get_rng_state(), torch.stack(masks)))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", CLOSED)
def test_a_step_given_up_in_its_last_pass_has_drawn_one(name):
    training, _ = dropping(name)
    torch.manual_seed(5)
    training.model(training.x)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    last = passes_of(name, 0)
    torch.manual_seed(5)
    for number in training.optimizer.passes():
        training.closure()
        if number == last - 1:
            break
    assert torch.equal(torch.get_rng_state(), expected)


class Drawing(nn.Module):
    """Leaves its input out, or not, as a generator says that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw, self.drawn = draw, list[float]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.drawn.append(self.draw())
        return x * (self.drawn[-1] > 0.3)


# numpy's randn keeps every second number for the next call.
DRAWS = {
    "python": random.random,
    "gauss": lambda: random.gauss(0.5, 1),
    "numpy": np.random.rand,
    "randn": np.random.randn,
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("same", [True, False])
def test_generators_of_python_and_numpy_too(name, draw, same):
    if not same and name not in TWO:
        return
    model = network()
    model[3] = layer = Drawing(DRAWS[draw])
    training = Training(name, model, **({} if same else {"same_randomness": False}))
    random.seed(0), np.random.seed(0)
    steps = []
    for _ in range(6):
        training.step()
        steps.append(layer.drawn[:2])  # ESAM's third pass draws on, for fewer samples
        layer.drawn.clear()
    assert len({step[0] for step in steps}) == 6
    assert all((len(set(step)) == 1) == (same or len(step) == 1) for step in steps)
    if same:
        random.seed(0), np.random.seed(0)
        assert [step[0] for step in steps] == [DRAWS[draw]() for _ in range(6)]
