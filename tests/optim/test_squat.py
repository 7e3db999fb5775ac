"""SQuAT: SAM on weights and learned step sizes in turn, against the rule written out, on a quantised network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from tests.optim._problem import assert_same

LOW, HIGH = -2, 1  # of 2 bits


class FakeQuantizer(nn.Module):
    """LSQ: rounds to a learned step size; gradients are passed where nothing is clipped."""

    def __init__(self, weight):
        super().__init__()
        self.scale = nn.Parameter(weight.detach().abs().amax(1, keepdim=True) / 1.5)

    def forward(self, weight):
        levels = (weight / self.scale).clamp(LOW, HIGH)
        return (levels + (levels.round() - levels).detach()) * self.scale


class Linear(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.quantizer = FakeQuantizer(self.weight)

    def forward(self, x):
        return F.linear(x, self.quantizer(self.weight), self.bias)


class Training:
    def __init__(self, dtype=torch.float64, base=None, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(Linear(4, 8), nn.Tanh(), Linear(8, 3)).to(dtype)
        self.x, self.y = torch.randn(12, 4, dtype=dtype), torch.randint(3, (12,))
        self.quantizers = [layer.quantizer for layer in self.model if isinstance(layer, Linear)]
        self.sizes = [each.scale for each in self.quantizers]
        self.weights = [each for each in self.model.parameters() if not any(each is size for size in self.sizes)]
        groups = [{"params": self.weights}, {"params": self.sizes, "lr": 0.01, "weight_decay": 0.0}]
        self.base = (base or (lambda some: torch.optim.AdamW(some, lr=0.02, weight_decay=0.1)))(groups)
        if options.get("perturb") == "quantized":
            options["quantizers"] = self.quantizers
        self.optimizer = flatmin.SQuAT(self.base, step_sizes=self.sizes, **{"rho": 0.3, **options})
        self.seen, self.factor = [], {}

    def loss(self):
        return F.cross_entropy(self.model(self.x), self.y)

    def closure(self):
        self.seen.append(copy.deepcopy([[*self.weights], [*self.sizes]]))
        self.optimizer.zero_grad()
        loss = self.loss() * self.factor.get(len(self.seen), 1.0)
        self.optimizer.scaler.scale(loss).backward()
        return loss

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.step(self.closure)
            self.optimizer.scaler.update()

    def state(self):
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})


def at_moved_quantized_weights(training, parameters, rho):
    made = []

    def hooked(hook):
        return [each.register_forward_hook(hook) for each in training.quantizers]

    def ended(handles):
        for handle in handles:
            handle.remove()

    handles = hooked(lambda _, __, output: made.append(output))
    own = torch.autograd.grad(training.loss(), made)
    ended(handles)
    norm = torch.sqrt(sum(each.square().sum() for each in own))
    offsets = iter([rho * each / (norm + 1e-12) for each in own])
    handles = hooked(lambda _, __, output: output + next(offsets))
    gradients = torch.autograd.grad(training.loss(), parameters)
    ended(handles)
    return gradients


def by_hand(training, steps, period=2, rho=0.3, quantized=False):
    """The rule over one optimizer, in which what stands still has no gradient."""
    parameters = [*training.weights, *training.sizes]
    for index in range(steps):
        learns = index % period == period - 1
        gradients = torch.autograd.grad(training.loss(), parameters)
        if not learns and not quantized:
            own = gradients[: len(training.weights)]
            norm = torch.sqrt(sum(each.square().sum() for each in own))
            old = [weight.detach().clone() for weight in training.weights]
            with torch.no_grad():
                for weight, gradient in zip(training.weights, own, strict=True):
                    weight += rho * gradient / (norm + 1e-12)
            gradients = torch.autograd.grad(training.loss(), parameters)
            with torch.no_grad():
                for weight, before in zip(training.weights, old, strict=True):
                    weight.copy_(before)
        elif not learns:
            gradients = at_moved_quantized_weights(training, parameters, rho)
        still = training.weights if learns else training.sizes
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if any(parameter is each for each in still) else gradient
        training.base.step()


@pytest.mark.parametrize("period", [2, 3])
@pytest.mark.parametrize("perturb", ["weights", "quantized"])
def test_it_is_the_rule(period, perturb):
    ours, theirs = (Training(period=period, perturb=perturb) for _ in range(2))
    ours.step(7)
    by_hand(theirs, 7, period, quantized=perturb == "quantized")
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_where_e_is_added_matters():
    before, after = Training(), Training(perturb="quantized")
    before.step(6)
    after.step(6)
    assert not torch.equal(before.weights[0], after.weights[0])


@pytest.mark.parametrize("period", [2, 3])
def test_weights_and_step_sizes_take_turns(period):
    training = Training(period=period)
    for index in range(6):
        weights, sizes = copy.deepcopy((training.weights, training.sizes))
        training.seen.clear()
        training.step()
        learns = index % period == period - 1
        assert len(training.seen) == (1 if learns else 2)
        still, moved = (training.weights, training.sizes) if learns else (training.sizes, training.weights)
        for now, old in zip(still, weights if learns else sizes, strict=True):
            assert torch.equal(now, old)
        assert any(not torch.equal(now, old) for now, old in zip(moved, sizes if learns else weights, strict=True))
        if not learns:
            (first, first_sizes), (second, second_sizes) = training.seen
            length = torch.sqrt(sum((b - a).detach().square().sum() for a, b in zip(first, second, strict=True)))
            assert float(length) == pytest.approx(0.3)
            assert all(torch.equal(a, b) for a, b in zip(first_sizes, second_sizes, strict=True))


def test_at_rho_0_it_is_the_base_optimizer_with_one_part_frozen_in_turn():
    ours, theirs = Training(rho=lambda _: 0.0), Training()
    ours.step(6)
    for index in range(6):
        theirs.base.zero_grad()
        theirs.loss().backward()
        for parameter in theirs.weights if index % 2 else theirs.sizes:
            parameter.grad = None
        theirs.base.step()
    assert_same(ours.model.state_dict(), theirs.model.state_dict())


def test_it_resumes_with_its_phase():
    whole, second = Training(), Training()
    whole.step(3)
    state = whole.state()
    whole.step(4)
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.step(4)
    assert_same(second.state(), whole.state())


def test_step_sizes_stay_above_0():
    def make(groups):
        groups[1]["lr"] = 5.0
        return torch.optim.SGD(groups, lr=0.1)

    training = Training(base=make)
    for _ in range(10):
        training.step()
        assert all((size > 0).all() for size in training.sizes)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_is_not_finite_is_dropped(number):
    """The third pass is that of a step that learns step sizes."""
    training, twin = Training(), Training()
    training.factor = {number: float("inf")}
    with pytest.warns(NonFiniteGradientWarning):
        training.step(2)
    assert training.optimizer.skipped_steps == 1
    training.step(2)
    twin.step(3)
    assert_same(training.model.state_dict(), twin.model.state_dict())


def test_loops_of_other_kinds_make_the_same_steps():
    closure, passes, calls = Training(), Training(), Training()
    closure.step(4)
    for _ in range(4):
        for _ in passes.optimizer.passes():
            passes.closure()
        calls.closure()
        if calls.optimizer.perturb():
            calls.closure()
            calls.optimizer.restore()
        calls.optimizer.step()
    assert_same(passes.model.state_dict(), closure.model.state_dict())
    assert_same(calls.model.state_dict(), closure.model.state_dict())


def test_gradients_of_micro_batches_are_added_up():
    """Quantised weights are moved along the gradient of the whole batch."""
    whole, parts = Training(perturb="quantized"), Training(perturb="quantized")
    whole.step(4)

    def closure():
        parts.optimizer.zero_grad()
        for x, y in zip(parts.x.chunk(2), parts.y.chunk(2), strict=True):
            (F.cross_entropy(parts.model(x), y) / 2).backward()
        return 0.0

    for _ in range(4):
        parts.optimizer.step(closure)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_sizes": None}, "step_sizes must be several tensors, got None"),
        ({"step_sizes": []}, "step_sizes is empty"),
        ({"step_sizes": [nn.Parameter(torch.ones(1))]}, "step_sizes has a tensor of shape .* that base_optimizer does"),
        ({"period": 1}, "period must be an integer of at least 2"),
        ({"rho": 0.0}, "rho must"),
        ({"perturb": "scales"}, "perturb must be 'weights' or 'quantized'"),
        ({"quantizers": [nn.Identity()]}, "quantizers are of use with perturb='quantized'"),
        ({"quantizers": None}, "quantizers must be modules, got NoneType"),
        ({"perturb": "quantized", "quantizers": []}, "perturb='quantized' needs quantizers="),
        ({"perturb": "quantized", "quantizers": [torch.ones(1)]}, "quantizers must be modules"),
        ({"perturb": "quantized", "quantizers": [nn.Identity()], "norm": "global"}, "norm must be 'rank' with"),
        (
            {"perturb": "quantized", "quantizers": [nn.Identity()], "scaling": flatmin.optim.Elementwise()},
            "scaling: perturb='quantized' takes none",
        ),
    ],
)
def test_bad_arguments(options, message):
    training = Training()
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.SQuAT(training.base, **{"step_sizes": training.sizes, **options})


def test_step_sizes_alone_are_no_network():
    training = Training()
    with pytest.raises(InvalidArgumentError, match="step_sizes are all parameters"):
        flatmin.SQuAT(torch.optim.SGD(training.sizes, lr=0.1), step_sizes=training.sizes)


def test_step_sizes_that_nothing_uses_are_noticed():
    training = Training()
    unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    training.base.add_param_group({"params": [unused]})
    training.optimizer = flatmin.SQuAT(training.base, step_sizes=[unused])
    training.step()
    with pytest.raises(InvalidArgumentError, match="none of the step sizes of SQuAT has a gradient"):
        training.step()


def test_quantizers_that_are_not_run_are_noticed():
    training = Training()
    training.optimizer = flatmin.SQuAT(
        training.base, step_sizes=training.sizes, perturb="quantized", quantizers=[nn.Identity()]
    )
    with pytest.raises(InvalidArgumentError, match="quantizers: none of them was seen"):
        training.step()
