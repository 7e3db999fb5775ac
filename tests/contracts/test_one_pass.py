"""One-pass methods in loops without a closure: bit-identical to a closure that makes the same passes."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flatmin
from flatmin.errors import InvalidArgumentError
from tests.contracts._one_pass import ONE_PASS, losses, made, outside_scaler, plain
from tests.contracts._optimizers import EVERY, B, C, Training, assert_same, network, sgd
from tests.reference import oracles

every = pytest.mark.parametrize("name", ONE_PASS)
STEPS = 4


def test_there_are_some():
    assert ONE_PASS == ["MSAM", "S2SAM"]


# Loops. Each makes one step over some micro-batches.


def clears_late(training: Training, parts: int) -> None:
    for index, loss in enumerate(losses(training, parts)):
        value = loss()
        if index == 0:
            training.optimizer.zero_grad()
        value.backward()
    training.optimizer.step()


def clears_with_zeros(training: Training, parts: int) -> None:
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=False)


def clears_the_model(training: Training, parts: int) -> None:
    training.model.zero_grad()
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.step()


def forwards_first(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    for value in [loss() for loss in losses(training, parts)]:
        value.backward()
    training.optimizer.step()


def gradients_assigned(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    parameters = list(training.model.parameters())
    for loss in losses(training, parts):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    training.optimizer.step()


def looks_around(training: Training, parts: int) -> None:
    """Evaluates and saves wherever it can."""
    model, optimizer = training.model, training.optimizer

    def look() -> None:
        mode = model.training
        model.eval()
        with torch.no_grad():
            model(training.x)
        copy.deepcopy(model.state_dict()), optimizer.state_dict()
        model.train(mode)

    optimizer.zero_grad()
    for loss in losses(training, parts):
        look()
        value = loss()
        look()
        with torch.inference_mode():
            look()
        value.backward()
        look()
    optimizer.step()


def by_hand(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    assert training.optimizer.perturb()
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.restore()
    training.optimizer.step()


def by_hand_each_time(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        training.optimizer.perturb(), training.optimizer.perturb()
        loss().backward()
        training.optimizer.restore(), training.optimizer.restore()
    training.optimizer.step()


def nobody_restores(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    training.optimizer.perturb()
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.step()


def two_pass_loop(training: Training, parts: int) -> None:
    """As a loop that does not know how many passes the method has, and asks after the first."""
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        loss().backward()
    assert not training.optimizer.perturb()
    training.optimizer.restore()
    training.optimizer.step()


def lightning(training: Training, parts: int) -> None:
    """Manual optimisation: Lightning's own closure does nothing."""
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.step(lambda: None)


def lightning_accumulates(training: Training, parts: int) -> None:
    """Automatic optimisation: all but the last micro-batch come before the step, and its closure adds to them."""
    *first, last = losses(training, parts)
    training.optimizer.zero_grad()
    for loss in first:
        loss().backward()
    training.optimizer.step(lambda: last().backward())


def inside_scaler(training: Training, parts: int) -> None:
    training.optimizer.scaler = scaler = training.outside
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        scaler.scale(loss()).backward()
    training.optimizer.step()
    scaler.update()


def both_scalers(training: Training, parts: int) -> None:
    training.optimizer.scaler = training.outside
    outside_scaler(training, parts)


LOOPS = [
    plain,
    clears_late,
    clears_with_zeros,
    clears_the_model,
    forwards_first,
    gradients_assigned,
    looks_around,
    by_hand,
    by_hand_each_time,
    nobody_restores,
    two_pass_loop,
    lightning,
    lightning_accumulates,
    outside_scaler,
    inside_scaler,
    both_scalers,
]


@pytest.mark.filterwarnings("ignore:.*update_bn")  # small weights, and an evaluation in between
@every
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_it_equals_the_closure_to_the_bit(name, loop, parts):
    ours, theirs = made(name, model=network(0.5)), made(name, model=network(0.5), parts=parts)
    ours.outside = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        torch.manual_seed(step)
        loop(ours, parts)
        torch.manual_seed(step)
        theirs.step()
        assert_same(ours.state(), theirs.state())


@every
@pytest.mark.parametrize("options", [{}, {"scaling": flatmin.optim.Elementwise(0.01)}, {"max_norm": 0.05}])
def test_it_equals_the_closure_with_other_options(name, options):
    ours, theirs = made(name, **options), made(name, parts=2, **options)
    for _ in range(STEPS):
        plain(ours, 2), theirs.step()
    assert_same(ours.state(), theirs.state())


@every
def test_some_of_the_parameters(name):
    """Perturbed, or trained at all."""
    for part in (lambda model: model[4], lambda model: model[0]):
        ours, theirs = (made(name, base=lambda model, part=part: sgd(part(model))) for _ in range(2))
        for _ in range(STEPS):
            plain(ours, 1), theirs.step()
        assert_same(ours.state(), theirs.state())
    model, other = network(), network()
    ours = made(name, model=model, parameters=model[0].parameters())
    theirs = made(name, model=other, parameters=other[0].parameters())
    for _ in range(STEPS):
        plain(ours, 1), theirs.step()
    assert_same(ours.state(), theirs.state())


@every
def test_the_same_by_hand_in_float64(name):
    """With accumulation, uneven parts and no closure anywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    training = made(name, model=model, base=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    weights = [p.detach().clone() for p in model.parameters()]
    pieces = [slice(0, 5), slice(5, 10), slice(10, 12)]
    momentum = before = None
    for _ in range(STEPS):
        training.optimizer.zero_grad()
        for piece in pieces:
            (F.cross_entropy(model(training.x[piece]), training.y[piece], reduction="sum") / B).backward()
        training.optimizer.step()

        direction, sign = (momentum, -1.0) if name == "MSAM" else (before, 1.0)
        point = weights
        if direction is not None:
            length = sum(float(d.square().sum()) for d in direction) ** 0.5
            point = [w + sign * 0.3 * d / (length + 1e-12) for w, d in zip(weights, direction, strict=True)]
        loss = lambda w: F.cross_entropy(torch.tanh(training.x @ w[0].T + w[1]) @ w[2].T + w[3], training.y)  # noqa: E731
        before = oracles.autograd(loss)(point)
        momentum = before if momentum is None else [0.9 * m + g for m, g in zip(momentum, before, strict=True)]
        weights = [w - 0.1 * m for w, m in zip(weights, momentum, strict=True)]
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-13)


@every
def test_mixed_with_closures(name):
    ours, theirs = made(name), made(name)
    for step in range(6):
        ours.step() if step % 2 else plain(ours, 1)
        theirs.step()
    ours.loop(), plain(ours, 1), theirs.step(2)
    assert_same(ours.state(), theirs.state())


@every
def test_a_closure_is_as_before_whatever_is_attached(name):
    """Other optimizers of the networks that it calls, and forwards in between."""
    ours, theirs = made(name), Training(name)
    torch.manual_seed(1)
    head = nn.Linear(C, C).double()
    other = EVERY[name](torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=head)
    for _ in range(3):
        head(torch.ones(2, C).double()).sum().backward()
        other.step()
    for training in (ours, theirs):
        training.forward = lambda x, training=training: head(training.model(x))
        training.step(STEPS)
    assert_same(ours.state(), theirs.state())
    sam = Training("SAM")
    sam.forward = lambda x: head(sam.model(x))
    seen = []
    sam.each_pass = lambda: seen.append(head.weight.detach().clone())
    head.register_forward_hook(lambda *_: seen.append(head.weight.detach().clone()))
    sam.step(2)
    assert len(seen) == 8
    assert all(torch.equal(weight, seen[0]) for weight in seen)


class Whole(nn.Module):
    """A network in parts, as programs have them; ``way`` says how it is called and what it returns."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = network(0.5), way

    def forward(self, x: torch.Tensor) -> object:
        if self.way.startswith("checkpoint"):
            out = self.net[0](x)
            return self.net[4](checkpoint(self.net[1:4], out, use_reentrant=self.way.endswith("reentrant")))
        out = self.net(x)
        return {
            "tuple": (out, None, 3),
            "dict": {"a": [out], "b": "c"},
            "dataclass": Output(out),
            "object": Foreign(out),
            "two": (out[:, :1], out[:, 1:]),
        }.get(self.way, out)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Foreign:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def logits(output: object) -> torch.Tensor:
    if isinstance(output, dict):
        return output["a"][0]
    if isinstance(output, tuple):
        return output[0] if len(output) == 3 else torch.cat(output, 1)
    return getattr(output, "logits", output)


def called(way: str) -> tuple[Whole, nn.Module, Callable[[torch.Tensor], object]]:
    """A network, what the optimizer is given, and what the loop calls."""
    whole = Whole(way)
    if way == "compiled":
        outer = torch.compile(whole, backend="aot_eager")
        return whole, outer, outer
    if way == "compiled, the network given":
        return whole, whole, torch.compile(whole, backend="eager", fullgraph=True)
    if way == "compile()":
        whole.compile(backend="eager", fullgraph=True)
    if way == "list":  # is not called itself
        parts = nn.ModuleList([whole.net[:1], whole.net[1:]])
        return whole, parts, lambda x: parts[1](parts[0](x))
    if way == "within itself":  # as Lightning calls a module through DistributedDataParallel
        forward = whole.forward

        def step(x: torch.Tensor) -> object:
            whole.forward = forward
            try:
                return whole(x)
            finally:
                whole.forward = step

        whole.forward = step
    return whole, whole, whole


WAYS = ["checkpoint", "checkpoint reentrant", "tuple", "dict", "dataclass", "object", "two", "list", "within itself"]
WAYS += ["compiled", "compiled, the network given", "compile()"]


@every
@pytest.mark.parametrize("way", WAYS)
def test_networks_as_programs_call_them(name, way):
    trainings = []
    for _ in range(2):
        whole, given, outer = called(way)
        training = Training(name, model=whole, parts=2)
        training.optimizer = EVERY[name](sgd(whole), rho=0.3, model=given)
        training.forward = lambda x, outer=outer: logits(outer(x))
        trainings.append(training)
    ours, theirs = trainings
    for step in range(STEPS):
        torch.manual_seed(step), plain(ours, 2)
        torch.manual_seed(step), theirs.step()
        assert_same(ours.state(), theirs.state())


@every
def test_checkpointing_of_the_whole_network(name):
    ours, theirs = made(name, model=network(0.5)), made(name, model=network(0.5))
    for training in (ours, theirs):
        training.forward = lambda x, m=training.model: checkpoint(m, x, use_reentrant=False)
    for step in range(STEPS):
        torch.manual_seed(step), plain(ours, 2), torch.manual_seed(step)
        theirs.parts = 2
        theirs.step()
    assert_same(ours.state(), theirs.state())
    ours.forward = lambda x: checkpoint(ours.model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(InvalidArgumentError, match="use_reentrant=False"):
        plain(ours, 1)
    theirs.forward = lambda x: checkpoint(theirs.model, x.requires_grad_(), use_reentrant=True)
    theirs.parts = 1
    theirs.step()


@every
def test_penalties_on_weights_and_gradients(name):
    """What is computed from the weights outside of the forward pass, and a backward pass within it."""

    def loss_of(training: Training) -> torch.Tensor:
        x = training.x.clone().requires_grad_()
        out = training.model(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return (
            F.cross_entropy(out, training.y)
            + slope.square().mean()
            + sum(p.norm() for p in training.model.parameters())
        )

    ours, theirs = made(name), made(name)

    def closure() -> None:
        theirs.optimizer.zero_grad()
        loss_of(theirs).backward()

    for _ in range(STEPS):
        ours.optimizer.zero_grad()
        loss_of(ours).backward()
        ours.optimizer.step()
        theirs.optimizer.step(closure)
    assert_same(ours.state(), theirs.state())


@every
def test_a_gan(name):
    """Two optimizers of two networks that call each other; each network trains at its own perturbed weights."""

    def nets() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def optimizer(net: nn.Module, **options: object) -> torch.optim.Optimizer:
        return EVERY[name](torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.3, **options)

    noise, real = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    generator, critic = nets()
    first, second = optimizer(generator, model=generator), optimizer(critic, model=critic)
    other_generator, other_critic = nets()
    third, fourth = optimizer(other_generator), optimizer(other_critic)
    for _ in range(STEPS):
        second.zero_grad()
        fake = generator(noise)
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        second.step()
        first.zero_grad()
        critic.requires_grad_(False)  # or it would be at its perturbed weights, too
        (-critic(fake if _ else generator(noise)).mean()).backward()
        critic.requires_grad_(True)
        first.step()

        # the same by hand; the critic is trained on what the moved generator makes
        third.perturb()
        fake = other_generator(noise)
        fourth.perturb()
        fourth.zero_grad()
        (other_critic(fake.detach()).mean() - other_critic(real).mean()).backward()
        fourth.step()
        third.zero_grad()
        (-other_critic(fake).mean()).backward()
        third.step()
    assert_same(generator.state_dict(), other_generator.state_dict())
    assert_same(critic.state_dict(), other_critic.state_dict())
