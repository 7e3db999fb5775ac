"""Another optimizer that trains the rest of the network with the gradient of the same pass is warned of, once."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import flatmin
from flatmin.errors import FlatminWarning
from tests.contracts._optimizers import EVERY, Training, assert_same, network
from tests.optim.test_joined import matrices_and_rest

every = pytest.mark.parametrize("name", EVERY)
given = pytest.mark.parametrize("given", [False, True])
SAID = "AdamW trains a part of the network beside"


def bases(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = matrices_and_rest(model)
    return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]


def apart(name: str, given: bool = False, **options):
    """A network whose matrices one optimizer trains, and whose rest another."""
    training = Training(name, base=lambda model: bases(model)[0], given=given, **options)
    return training, bases(training.model)[1]


def train(training, other, steps=3, between=lambda training, other: None):
    """As somebody writes it who has two optimizers; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            other.zero_grad()
            training.step()
            between(training, other)
            other.step()
    return [each for each in caught if issubclass(each.category, FlatminWarning)]


@every
def test_it_is_said_once_and_names_the_way_out(name):
    caught = train(*apart(name))
    assert len(caught) == 1
    assert f"{SAID} {name}" in str(caught[0].message)
    assert f"{name}([SGD, AdamW], ...)" in str(caught[0].message)
    assert caught[0].filename == __file__


@every
def test_the_way_out_is_silent_and_with_parameters_it_is_the_same_training(name):
    (apart_ours, other), model = apart(name), network()
    train(apart_ours, other)
    joined = Training(name, model, base=bases, parameters=matrices_and_rest(model)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined.step(3)
    if name in ("SAM", "ASAM", "MSAM", "S2SAM"):  # the others look at the gradient of all parameters
        assert_same(apart_ours.model.state_dict(), joined.model.state_dict())


def perturbed(training):
    training.closure()
    if training.optimizer.perturb():
        training.closure()
        training.optimizer.restore()
    training.optimizer.step()


def one_pass(training):
    training.closure()
    training.optimizer.step()


@pytest.mark.parametrize(
    ("name", "step"), [("SAM", perturbed), ("SAM", Training.loop), ("MSAM", Training.loop), ("MSAM", one_pass)]
)
def test_whoever_makes_the_passes(name, step):
    training, other = apart(name, given=step is one_pass)
    training.step = lambda: step(training)
    assert len(train(training, other)) == 1


def clipped(training, _):
    nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)


def cleared(to_none):
    """A backward pass of its own, as a discriminator's."""

    def between(training, other):
        other.zero_grad(set_to_none=to_none)
        training.model(training.x).square().mean().backward()

    return between


@pytest.mark.parametrize(
    ("between", "warned"),
    [(clipped, True), (cleared(True), False), (cleared(False), False)],
    ids=["clipped", "set to none", "zeroed"],
)
@pytest.mark.parametrize("name", ["SAM", "MSAM"])
def test_only_the_gradient_of_the_same_pass_counts(name, between, warned):
    assert len(train(*apart(name), between=between)) == warned


def test_a_scaler_that_unscales_for_the_other_hides_nothing():
    scaler = torch.amp.GradScaler("cpu")
    training, other = apart("SAM", scaler=scaler, dtype=torch.float32)
    assert len(train(training, other, between=lambda _, other: scaler.unscale_(other))) == 1


def frozen(model):
    """The rest needs no gradient."""
    for parameter in matrices_and_rest(model)[1]:
        parameter.requires_grad_(False)


def test_what_is_meant_is_silent():
    head, other = apart("SAM")
    other.step = lambda: None  # a part is trained, and nothing else: of the rest nobody makes use
    late, theirs = apart("SAM", when=flatmin.optim.Late(0.1, steps=10))  # plain steps
    tuned, _ = apart("SAM")
    frozen(tuned.model)
    body, top = Training("SAM"), nn.Linear(3, 3).double()  # two networks
    body.forward = lambda x: top(body.model(x))
    moved = Training("MSAM", base=lambda model: bases(model)[0])  # the rest is perturbed, by itself
    second = flatmin.MSAM(bases(moved.model)[1])
    for training, optimizer in (
        (head, other),
        (late, theirs),
        (tuned, _),
        (body, torch.optim.AdamW(top.parameters())),
        (moved, second.base_optimizer),
    ):
        assert not train(training, optimizer)


@given
def test_copies_and_optimizers_that_are_gone_are_let_go(given):
    training, other = apart("SAM", given)
    assert len(train(training, other)) == 1
    twin, its = copy.deepcopy((training, other))
    assert len(train(twin, its)) == 1
    del training, twin
    gc.collect()
    assert not other._optimizer_step_pre_hooks


def later(name, when, of_network, given=False):
    """A second optimizer whose gradients the loop clears, made before the first step or later, or anew."""
    training = Training(name, base=lambda model: bases(model)[0], given=given)
    trained = matrices_and_rest(training.model)[1] if of_network else [nn.Parameter(torch.ones(3).double())]
    if not of_network:
        training.forward = lambda x: training.model(x) * trained[0]
    other = torch.optim.AdamW(trained, lr=0.01) if when != "later" else None
    caught = []
    for step in range(4):
        if step == 1 and when != "before":
            other = None
            other = torch.optim.AdamW(trained, lr=0.01)
        for parameter in trained:
            parameter.grad = None
        with warnings.catch_warnings(record=True) as some:
            warnings.simplefilter("always")
            training.step()
            if step:
                other.step()
        caught += [str(each.message) for each in some if issubclass(each.category, FlatminWarning)]
    return [*training.model.state_dict().values(), *trained], caught


@pytest.mark.parametrize(
    ("name", "when", "of_network"),
    [*((name, "later", True) for name in EVERY), ("SAM", "anew", True), ("SAM", "anew", False)],
)
def test_an_optimizer_that_is_made_later_is_known(name, when, of_network):
    ours, caught = later(name, when, of_network, given=of_network)
    plain, said = later(name, "before", of_network, given=of_network)
    for left, right in zip(ours, plain, strict=True):
        assert torch.equal(left, right)
    assert caught == said
    assert len(caught) == of_network


def test_one_of_flatmins_that_is_made_later_is_none_beside():
    training = Training("MSAM", base=lambda model: bases(model)[0])
    training.step()
    second = flatmin.MSAM(bases(training.model)[1])
    for _ in range(2):
        training.step()
        second.step(training.closure)
    assert not train(training, second.base_optimizer)


def test_of_parameters_elsewhere_it_is_known_from_its_first_step_on():
    training, seen = Training("SAM"), []
    scale = nn.Parameter(torch.ones(3).double())
    training.forward = lambda x: training.model(x) * scale
    training.step()
    other = torch.optim.SGD([scale], lr=0.0)
    for _ in range(2):
        scale.grad = None
        training.step()
        seen.append(scale.grad.clone())
        other.step()
    assert (seen[0] - seen[1]).norm() > 0.3 * seen[1].norm()  # of both passes, and of the second alone


def test_what_an_optimizer_knows_ends_with_it():
    training = Training("SAM")
    training.step()
    hooks, kept = len(_global_optimizer_pre_hooks), weakref.ref(training.optimizer._surroundings._others)
    del training
    gc.collect()
    assert kept() is None
    Training("SAM").step()
    assert len(_global_optimizer_pre_hooks) == hooks
