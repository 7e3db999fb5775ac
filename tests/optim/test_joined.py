"""Several base optimizers in one wrapper: one perturbation, a step of each, and one state."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import flatmin
from flatmin.errors import InvalidArgumentError
from tests.contracts._optimizers import CLOSURES, EVERY, Training, assert_same, network, sgd
from tests.optim._problem import TRAINED, Problem
from tests.optim.test_wrapper import ScheduleFree
from tests.reference import oracles

every = pytest.mark.parametrize("name", EVERY)


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    every = list(model.parameters())
    return [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]


def two_sgds(model: nn.Module) -> list[torch.optim.Optimizer]:
    """What one SGD with two groups is."""
    matrices, rest = matrices_and_rest(model)
    return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.SGD(rest, lr=0.2, momentum=0.9)]


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices, rest = matrices_and_rest(model)
    return torch.optim.SGD([{"params": matrices}, {"params": rest, "lr": 0.2}], lr=0.1, momentum=0.9)


def muon_and_adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    matrices, rest = matrices_and_rest(model)
    first = getattr(torch.optim, "Muon", torch.optim.SGD)(matrices, lr=0.05)
    return first, torch.optim.AdamW(rest, lr=0.1)


@every
def test_two_are_one_with_two_groups_to_the_bit(name):
    ours, theirs = Training(name, base=two_sgds), Training(name, base=two_groups)
    assert ours.step(6) == theirs.step(6)
    assert_same(ours.model.state_dict(), theirs.model.state_dict())
    assert_same(ours.optimizer.state_dict(), theirs.optimizer.state_dict())
    assert [len(group["params"]) for group in ours.optimizer.param_groups] == [2, 4]
    theirs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    ours.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    assert ours.step(2) == theirs.step(2)


def test_one_norm_is_over_the_parameters_of_all():
    """In float64 by hand: SGD and AdamW, each fed with the gradient at w + rho g / |g|, |g| over all parameters."""
    problem, twin = Problem(), Problem()
    matrices, rest = matrices_and_rest(problem.model)
    optimizer = flatmin.SAM([torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.05)], rho=0.5)
    matrices, rest = matrices_and_rest(twin.model)
    plain = torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.05)
    for _ in range(4):
        problem.steps(optimizer)
        weights = [twin.model.get_parameter(n).detach().clone() for n in TRAINED]
        gradients, _ = oracles.sam_gradient(weights, twin.gradient(TRAINED), 0.5)
        for n, gradient in zip(TRAINED, gradients, strict=True):
            twin.model.get_parameter(n).grad = gradient
        for each in plain:
            each.step()
        for n in TRAINED:
            torch.testing.assert_close(
                problem.model.get_parameter(n), twin.model.get_parameter(n), rtol=1e-9, atol=1e-11
            )


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_run_goes_on_from_a_state_and_in_a_copy(name, duplicate):
    training = Training(name, base=muon_and_adamw)
    training.step(3)
    resumed, copied = Training(name, base=muon_and_adamw), Training(name, base=muon_and_adamw)
    resumed.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    copied.model, copied.optimizer = duplicate((training.model, training.optimizer))
    copied.forward = copied.model
    assert training.step(3) == resumed.step(3) == copied.step(3)
    assert_same(training.state(), resumed.state())
    assert_same(training.state(), copied.state())


@every
def test_hooks_run_once_for_each_and_schedulers_stand_around_any(name):
    training, fired = Training(name, base=two_sgds), []
    optimizer, (first, second) = training.optimizer, training.optimizer.base_optimizer.optimizers
    for who, which in (("wrapper", optimizer), ("first", first), ("second", second)):
        which.register_step_post_hook(lambda *_, who=who: fired.append(who))
    around = StepLR(optimizer, 1, gamma=0.5)
    alone = StepLR(second, 1, gamma=0.1)
    training.step()
    around.step(), alone.step()
    assert fired == ["first", "second", "wrapper"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    training.step()
    cycle = OneCycleLR(optimizer, 0.1, total_steps=5)
    training.step()
    cycle.step()


def test_groups_state_and_defaults_are_those_of_each():
    training = Training("SAM", base=muon_and_adamw)
    optimizer, (muon, adamw) = training.optimizer, training.optimizer.base_optimizer.optimizers
    training.step(2)
    bias = training.model[0].bias
    assert optimizer.param_groups[1] is adamw.param_groups[0]
    assert optimizer.state[bias] is adamw.state[bias]
    assert set(optimizer.state) == {*muon.state, *adamw.state}
    assert len(optimizer.state) == 6
    optimizer.state = {bias: {"step": torch.tensor(1.0)}}
    assert not muon.state
    assert list(adamw.state) == [bias]
    assert "lr" in optimizer.defaults
    assert "betas" not in optimizer.defaults
    optimizer.param_groups = [{**group, "lr": 0.25} for group in optimizer.param_groups]
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == 0.25
    assert repr(optimizer).count("Parameter Group 0") == 2


def test_what_only_one_has_and_what_is_called_on_each():
    model = network()
    matrices, rest = matrices_and_rest(model)
    free, plain = ScheduleFree(matrices, lr=0.1), torch.optim.SGD(rest, lr=0.1)
    optimizer = flatmin.SAM([free, plain])
    optimizer.eval()
    assert free.param_groups[0]["train_mode"] is False
    optimizer = flatmin.SAM([ScheduleFree(matrices, lr=0.1), ScheduleFree(rest, lr=0.1)])
    optimizer.eval()
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    assert not hasattr(flatmin.SAM(two_sgds(network())), "eval")
    free.own, plain.own = 1, 2
    with pytest.raises(AttributeError, match="several have one"):
        _ = flatmin.SAM([free, plain]).own


def test_a_list_of_one_is_that_one():
    base = sgd(network())
    assert flatmin.SAM([base]).base_optimizer is base


def test_what_cannot_be_joined_is_said():
    model = network()
    base = sgd(model)
    for wrong, message in (
        ([base, sgd(model)], "has a parameter of another one in the list"),
        ([], "got list of nothing"),
        ([{"params": []}], "got list of dict; write torch"),
        ([base, flatmin.SAM(sgd(network()))], "already"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^base_optimizer.*{message}"):
            flatmin.SAM(wrong)
    training = Training("SAM", base=two_sgds)
    optimizer = training.optimizer
    with pytest.raises(InvalidArgumentError, match=r"several base optimizers \(SGD, SGD\); add the group to the one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.base_optimizer.optimizers[1].add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    training.step()
    with pytest.raises(InvalidArgumentError, match="several base optimizers have 3 together, got 1"):
        optimizer.param_groups = optimizer.param_groups[:1]
    before = optimizer.state_dict()
    with pytest.raises(InvalidArgumentError, match="other parameter groups than the base optimizers together"):
        optimizer.load_state_dict(Training("SAM", base=two_sgds).optimizer.state_dict())
    assert_same(optimizer.state_dict(), before)


def test_what_a_hook_adds_to_the_state_of_one_travels_with_it():
    training, found = Training("SAM", base=two_sgds), []
    second = training.optimizer.base_optimizer.optimizers[1]
    second.register_state_dict_post_hook(lambda o, state: {**state, "more": 7})

    def take(optimizer, state):
        found.append(state["more"])

    second.register_load_state_dict_pre_hook(take)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    assert found == [7]
