"""A rho that moves the weights by much of their length is said, once, in the step that first does it."""

import warnings

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import FlatminWarning
from tests.contracts._optimizers import CLOSED, EVERY, TRAINED, Training


def made(name: str, hidden: int = 2000, **options: object) -> Training:
    torch.manual_seed(0)
    return Training(name, nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)), **options)


def norm(training: Training) -> float:
    return float(torch.cat([weight.detach().flatten() for weight in training.model.parameters()]).norm())


def said(training: Training, steps: int = 4) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.step(steps)
    return [str(each.message) for each in caught if each.category is FlatminWarning]


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "ASAM"])  # whose rho is no length
def test_a_rho_that_is_too_long_is_said_once(name):
    training = made(name)
    training.optimizer.rho = 0.15 * norm(training)
    (message,) = said(training)
    assert message.startswith(f"{name}'s rho=")
    assert "15% of their length" in message
    assert f"try rho={0.01 * norm(training):.1g}" in message


@pytest.mark.parametrize("name", TRAINED)
def test_a_usual_one_is_not(name):
    training = made(name)
    training.optimizer.rho = 0.08 * norm(training)
    assert said(training) == []


@pytest.mark.parametrize("name", CLOSED)
def test_nor_is_one_of_a_few_numbers_or_of_another_measure(name):
    training = made(name, hidden=20)
    training.optimizer.rho = 3.0
    assert said(training) == []
    if name not in ("ASAM", "SQuAT"):
        training = made(name, scaling=flatmin.optim.Elementwise())
        training.optimizer.rho = 3.0
        assert said(training) == []


def test_all_weights_count_where_some_are_moved():
    training = made("SAM")
    training.optimizer = flatmin.SAM(training.optimizer.base_optimizer, parameters=[training.model[2].bias], rho=1.0)
    assert float(training.model[2].bias.detach().norm()) < 1.0
    assert said(training) == []


@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("std", [0.0, 2e-5])
def test_nor_is_one_where_weights_have_yet_to_grow(std, name, rho):
    """As of a head over features: torch's own start is longer."""
    training = made(name)
    for weight in training.model.parameters():
        nn.init.normal_(weight, std=std)
    training.optimizer.rho = rho
    assert said(training, 2) == []


BESIDE = {
    "made later": lambda: nn.UninitializedParameter(),
    "elsewhere": lambda: nn.Parameter(torch.empty(3, device="meta")),
    "sparse": lambda: nn.Parameter(torch.eye(3).to_sparse()),
    "integers": lambda: nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False),
    "bytes": lambda: nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False),
    "empty": lambda: nn.Parameter(torch.zeros(0, 3)),
    "complex": lambda: nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_weights_without_gradient_of_any_kind_are_left_alone(kind):
    model = made("SAM").model.float()
    base = torch.optim.SGD([*model.parameters(), BESIDE[kind]()], lr=0.1)
    optimizer = flatmin.SAM(base, rho=0.05)

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.skipped_steps == 0


def in_two_steps(training: Training) -> None:
    training.closure()
    training.optimizer.first_step()
    training.closure()
    training.optimizer.second_step()


WAYS = {
    "closure": lambda training: training.optimizer.step(training.closure),
    "passes": lambda training: [training.closure() for _ in training.optimizer.passes()],
    "two steps": in_two_steps,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_line_is_the_users(way):
    training = made("SAM")
    training.optimizer.rho = 100.0
    with pytest.warns(FlatminWarning, match="rho=100") as caught:
        WAYS[way](training)
    assert caught[0].filename == __file__
