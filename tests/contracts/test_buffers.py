"""Buffers: those of a network stand still in the second pass, and a step that is dropped moves none of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import flatmin
from flatmin.errors import NonFiniteGradientWarning
from tests.contracts._optimizers import CLOSURES, EVERY, Training, assert_same, each_pass, network, passes_of
from tests.contracts.test_passes import two_steps

TWO = [name for name in EVERY if EVERY[name].max_passes == 2]


class Reassigning(nn.BatchNorm1d):
    """Replaces its statistics by other tensors."""

    def forward(self, x):
        mean, var = x.mean(0), x.var(0)
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.running_var = 0.9 * self.running_var + 0.1 * var
        return (x - mean) / (var + self.eps).sqrt()


class Counting(nn.LayerNorm):
    """A norm layer of torch's that has no buffer of its own."""

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("seen", torch.zeros(size))

    def forward(self, x):
        self.seen += x.detach().sum(0)
        return super().forward(x)


class Called(nn.Module):
    """Calls ``forward`` itself, so that no hook is run."""

    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(8, affine=False)

    def forward(self, x):
        return self.inner.forward(x)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("code", torch.randn(4, 8))

    def forward(self, x):
        found = torch.cdist(x, self.code).argmin(1)
        for k in found.unique():
            self.code[k].lerp_(x.detach()[found == k].mean(0), 0.1)
        return x


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(8, dtype=torch.int64))

    def forward(self, x):
        self.load += F.one_hot(x.argmax(1), 8).sum(0)
        return x


class Following(nn.Module):
    """Has parameters without gradient that follow trained ones in each forward pass, as MoCo's key encoder does."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.key.weight.lerp_(self.query.weight, 0.1)
            self.key.bias.data = 0.9 * self.key.bias.data + 0.1 * self.query.bias.data
        return self.query(x) + self.key(x)


class Growing(nn.Module):
    """Appends to its buffer, and has one that is not there at first, and one whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.zeros(0))
        self.register_buffer("first", None)
        self.register_buffer("same", torch.ones(1).expand(8))

    def forward(self, x):
        self.past = torch.cat([self.past, x.detach().mean().reshape(1)])
        self.first = x.detach().clone() if self.first is None else self.first
        return x * self.same


def around(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), layer(), nn.Linear(8, 3)).double()

    return make


def exported() -> nn.Module:
    inputs, shapes = (torch.randn(12, 4).double(),), ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(around(lambda: nn.BatchNorm1d(8))(), inputs, dynamic_shapes=shapes).module()


def instance() -> nn.Module:
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), norm, nn.Flatten())


# What is found by itself, and what has to be said by model=.
FOUND = {
    "batch norm": around(lambda: nn.BatchNorm1d(8)),
    "batch norm without momentum": around(lambda: nn.BatchNorm1d(8, momentum=None)),
    "instance norm": around(instance),
    "reassigning": around(lambda: Reassigning(8)),
    "layer norm that counts": around(lambda: Counting(8)),
    "called by forward": around(Called),
    "scripted": lambda: torch.jit.script(around(lambda: nn.BatchNorm1d(8))()),
    "exported": exported,
}
GIVEN = {
    "own": around(Own),
    "codebook": around(Codebook),
    "experts": around(Experts),
    "growing": around(Growing),
    "following": around(Following),
    "spectral norm": around(lambda: spectral_norm(nn.Linear(8, 8))),
    "old spectral norm": around(lambda: nn.utils.spectral_norm(nn.Linear(8, 8))),
    "observer": around(torch.ao.quantization.MovingAverageMinMaxObserver),
}
NETWORKS = [(kind, make, True) for kind, make in {**FOUND, **GIVEN}.items()]
NETWORKS += [(kind, make, False) for kind, make in FOUND.items()]
networks = pytest.mark.parametrize(("make", "given"), [pytest.param(m, g, id=f"{k}-{g}") for k, m, g in NETWORKS])


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that no gradient trains."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in [*model.named_buffers(), *frozen.items()]}


@pytest.mark.parametrize("name", TWO)
@networks
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_they_are_after_a_step_what_one_forward_pass_makes_of_them(name, make, given):
    training, twin = Training(name, make(), given=given), Training("SAM", make())
    for _ in range(3):
        with torch.no_grad():
            for parameter, trained in zip(twin.model.parameters(), training.model.parameters(), strict=True):
                parameter.copy_(trained)  # those without gradient are equal already
        before = buffers(twin.model)
        training.step()
        twin.model(twin.x)
        assert_same(buffers(training.model), buffers(twin.model))
        assert before.keys() != buffers(twin.model).keys() or any(
            before[key].shape != value.shape or not torch.equal(before[key], value)
            for key, value in buffers(twin.model).items()
        )


def poison(training: Training, number: int) -> None:
    """Infinite inputs in the pass of that number, from 1, and in none after it."""
    clean = training.x
    training.passes = 0

    def each_pass() -> None:
        training.x = clean.clone()
        if training.passes == number:
            training.x[:, 0] = float("inf")

    training.each_pass = each_pass


EACH = [each for each in each_pass() if each[1] == 2 or each[0] == "LookSAM"]  # whose steps differ


@pytest.mark.parametrize(("name", "steps", "number"), EACH)
@networks
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_dropped_step_leaves_them_and_the_averages_as_they_were(name, steps, number, make, given):
    training = Training(name, make(), given=given)
    averages = []
    if "exported" not in str(make) and not isinstance(training.model, torch.jit.ScriptModule):
        averages = [flatmin.EMA(training.model, decay=0.9)]
        averages[0].attach(training.optimizer)
    training.step(steps)
    before = copy.deepcopy([training.optimizer.state_dict(), [average.state_dict() for average in averages]])
    weights, found = [p.detach().clone() for p in training.model.parameters()], buffers(training.model)
    poison(training, number)
    with pytest.warns(NonFiniteGradientWarning):
        training.step()
    assert training.optimizer.step_dropped
    assert training.optimizer.skipped_steps == 1
    assert_same(buffers(training.model), found)
    assert_same([p.detach() for p in training.model.parameters()], weights)
    assert_same([training.optimizer.state_dict(), [average.state_dict() for average in averages]], before)
    training.step()
    assert not training.optimizer.step_dropped


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", [Training.loop, two_steps])
def test_other_ways_to_step_too(name, given, steps, way):
    """But for the first step of all by first_step, whose forward pass is over, and was not seen without ``model``."""
    first = way is two_steps and steps == 0 and EVERY[name].max_passes == 2 and not given
    for number in range(1, passes_of(name, steps) + 1):
        training = Training(name, given=given)
        way(training, steps)
        before = training.state()
        poison(training, number)
        with pytest.warns(NonFiniteGradientWarning):
            way(training, 1)
        if first:
            assert training.model[1].running_mean.isfinite().all() == (number == 2)
        else:
            assert_same(training.state(), before)


def test_what_a_loaded_state_brings_is_not_undone():
    """Between two steps of the loop for two steps, whose buffers are remembered from one to the next."""
    training, other = Training("SAM"), Training("SAM")
    two_steps(training, 2), two_steps(other, 4)
    training.model.load_state_dict(other.model.state_dict())
    training.optimizer.load_state_dict(other.optimizer.state_dict())
    poison(training, 2)
    training.closure()
    seen = buffers(training.model)
    training.optimizer.first_step()
    training.closure()
    with pytest.warns(NonFiniteGradientWarning):
        training.optimizer.second_step()
    assert_same(buffers(training.model), seen)


def compiled_function(training: Training) -> None:
    training.forward = torch.compile(lambda x: training.model(x), backend="eager")


def compiled_forward(training: Training) -> None:
    training.model.forward = torch.compile(training.model.forward, backend="eager")


def compiled_in_place(training: Training) -> None:
    training.model.compile(backend="eager")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", [compiled_function, compiled_forward, compiled_in_place])
@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_function_counts_each_batch_once(name, how, given):
    torch._dynamo.reset()
    training = Training(name, given=given)
    how(training)
    training.step(3)
    assert training.model[1].num_batches_tracked == 3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 4).double())])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_module_of_torch_jit_in_the_closure_changes_nothing(name, kind):
    ours, theirs = Training(name), Training(name)
    helper = kind(nn.Sequential(nn.Identity()).double().eval())
    ours.forward = lambda x: ours.model(helper(x))
    ours.step(3), theirs.step(3)
    assert_same(ours.state(), theirs.state())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("start", [None, 0.0, 2.0])
def test_another_optimizer_in_the_closure_gets_the_gradient_of_the_last_pass(name, given, start):
    body, head = network(), nn.Linear(3, 3).double()
    training = Training(name, body, given=given)
    other, seen = torch.optim.SGD(head.parameters(), lr=0.0), []
    training.forward = lambda x: head(body(x))
    for parameter in head.parameters():
        parameter.register_hook(seen.append)
    for _ in range(3):
        for parameter in head.parameters():
            parameter.grad = None if start is None else torch.full_like(parameter, start)
        seen.clear()
        training.step()
        last = seen[-2:]
        for parameter in head.parameters():
            (expected,) = [gradient for gradient in last if gradient.shape == parameter.shape]
            assert torch.equal(parameter.grad, expected if start is None else start + expected)
    assert other.param_groups
