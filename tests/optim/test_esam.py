"""ESAM, whose closure is told which samples to take."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim import Every
from tests.optim._problem import TRAINED, Problem, assert_same
from tests.reference import oracles


class Losses(Problem):
    """The problem with a function of the samples to keep, which notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[object] = []

    def each(self, keep):
        self.calls.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        self.kept.append((keep, torch.is_grad_enabled()))
        if len(self.calls) == self.raises:
            raise ValueError("in the closure")
        found = F.cross_entropy(self.model(self.x[keep]), self.y[keep], reduction="none")
        return found * self.factor.get(len(self.calls), 1.0)

    def closure(self, optimizer):
        return self.each


def of_samples(problem):
    def gradient_of(samples):
        index = torch.tensor(list(samples))

        def loss(weights):
            outputs = functional_call(problem.model, dict(zip(TRAINED, weights, strict=True)), (problem.x[index],))
            return F.cross_entropy(outputs, problem.y[index])

        return oracles.autograd(loss)

    def losses(weights):
        outputs = functional_call(problem.model, dict(zip(TRAINED, weights, strict=True)), (problem.x,))
        return F.cross_entropy(outputs, problem.y, reduction="none").tolist()

    return gradient_of, losses


@pytest.mark.parametrize("gamma", [0.5, 0.3])
def test_steps_equal_the_oracle(gamma):
    problem = Losses()
    optimizer = flatmin.ESAM(problem.sgd(), rho=0.3, beta=0.6, gamma=gamma)
    weights = [problem.model.get_parameter(n).detach().clone() for n in TRAINED]
    velocities = [torch.zeros_like(weight) for weight in weights]
    rates = {"lr": [0.1] * len(weights), "momentum": 0.9, "weight_decay": [0.0] * len(weights)}
    drawn = []
    for _ in range(8):
        done = len(problem.calls)
        loss = optimizer.step(problem.each)
        kept = [not torch.equal(problem.calls[done][n], problem.calls[-1][n]) for n in TRAINED]
        drawn.append(kept)
        arguments = {"rho": 0.3, "beta": 0.6, "gamma": gamma}
        gradient_of, losses = of_samples(problem)
        assert loss.item() == pytest.approx(sum(losses(weights)) / 12)
        gradient, e, samples = oracles.esam_gradient(weights, gradient_of, losses, kept, **arguments)
        if not any(kept):
            gradient = gradient_of(range(12))(weights)
        else:
            for n, offset in zip(TRAINED, e, strict=True):
                torch.testing.assert_close(problem.calls[-1][n] - problem.calls[done][n], offset)
            assert set(problem.kept[-1][0].tolist()) == set(samples)
        weights, velocities = oracles.sgd(weights, velocities, gradient, **rates)
        for n, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(n).data, weight, rtol=1e-9, atol=1e-11)
    share = sum(map(sum, drawn)) / (8 * len(TRAINED))
    assert 0.3 < share < 0.9
    assert len({tuple(kept) for kept in drawn}) > 2


def test_the_second_forward_has_no_gradient_and_the_second_pass_half_of_the_samples():
    problem = Losses()
    flatmin.ESAM(problem.sgd(), beta=1.0, gamma=0.5).step(problem.each)
    (first, with_gradient), (forward, without), (share, again) = problem.kept
    assert (first, forward) == (slice(None), slice(None))
    assert (with_gradient, without, again) == (True, False, True)
    assert len(share) == 6


def test_with_all_tensors_and_samples_it_is_sam():
    ours, theirs = Losses(), Problem()
    ours.steps(flatmin.ESAM(ours.sgd(), rho=0.5, beta=1.0, gamma=1.0), 4)
    theirs.steps(flatmin.SAM(theirs.sgd(), rho=0.5), 4)
    assert len(ours.calls) == 8
    for name, weight in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_steps_that_do_not_pay_call_once():
    problem = Losses()
    problem.steps(flatmin.ESAM(problem.sgd(), beta=1.0, when=Every(3)), 6)
    assert len(problem.calls) == 3 + 1 + 1 + 3 + 1 + 1


def test_resume_draws_the_same_tensors():
    problem = Losses()
    optimizer = flatmin.ESAM(problem.sgd(), rho=0.3)
    problem.steps(optimizer, 3)
    twin = Losses()
    resumed = flatmin.ESAM(twin.sgd(), rho=0.3)
    twin.model.load_state_dict(problem.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(problem.steps(optimizer, 5), twin.steps(resumed, 5))
    assert_same(problem.state(optimizer), twin.state(resumed))
    other = Losses()
    other.steps(flatmin.ESAM(other.sgd(), rho=0.3, seed=1), 8)
    assert not torch.equal(other.model.head.weight, problem.model.head.weight)


@pytest.mark.parametrize(("call", "fault"), [(1, "raises"), (2, "raises"), (3, "raises"), (1, "nan"), (3, "nan")])
def test_a_step_that_fails_leaves_no_trace(call, fault):
    problem = Losses()
    optimizer = flatmin.ESAM(problem.sgd(), rho=0.3, beta=1.0)
    problem.steps(optimizer, 2)
    before = problem.state(optimizer)
    if fault == "raises":
        problem.raises = 6 + call
        with pytest.raises(ValueError, match="in the closure"):
            problem.steps(optimizer)
    else:
        problem.factor[6 + call] = float("nan")
        with pytest.warns(NonFiniteGradientWarning):
            problem.steps(optimizer)
    assert_same(problem.state(optimizer), before)


def test_the_class_says_which_closure_it_takes():
    kinds = [kind for kind in vars(flatmin.optim).values() if isinstance(kind, type)]
    methods = [kind for kind in kinds if issubclass(kind, flatmin.optim.SharpnessAware)]
    assert [kind for kind in methods if kind.per_sample_closure] == [flatmin.ESAM]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: flatmin.ESAM(p.sgd(), beta=0), "^beta must .* > 0 and <= 1, got 0"),
        (lambda p: flatmin.ESAM(p.sgd(), gamma=1.1), "^gamma must .* got 1.1"),
        (lambda p: flatmin.ESAM(p.sgd(), seed=-1), "^seed must"),
        (lambda p: flatmin.ESAM(p.sgd()).step(), r"needs a closure.*def losses\(keep\)"),
        (
            lambda p: flatmin.ESAM(p.sgd()).step(lambda: p.each(slice(None)).mean()),
            r"def losses\(keep\).*cannot be had use flatmin.SAM",
        ),
        (
            lambda p: flatmin.ESAM(p.sgd()).step(lambda keep: p.each(keep).mean()),
            r"one loss a sample.*got shape \(\)",
        ),
        (lambda p: flatmin.ESAM(p.sgd()).step(lambda keep: None), r"one loss a sample.*got NoneType"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(Losses())
