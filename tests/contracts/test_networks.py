"""What a network may be, and a base optimizer: compiled, in groups, with parameters that are frozen, unused or tied."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import flatmin
from tests.contracts._optimizers import EVERY, Training, assert_same, network, sgd
from tests.optim._problem import Net

every = pytest.mark.parametrize("name", EVERY)


def tensors(training: Training) -> list[torch.Tensor]:
    return [*training.model.parameters(), *training.model.buffers()]


@every
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_a_compiled_network_is_trained_as_the_eager_one(name):
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours = Training(name, torch.compile(network(dropout=0.3), backend=backend))
    theirs, losses = Training(name, network(dropout=0.3)), []
    for training in (ours, theirs):
        torch.manual_seed(2)
        losses.append(training.step(4))
    assert graphs
    assert ours.passes == theirs.passes
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class SignDescent(torch.optim.Optimizer):
    """Somebody's optimizer, with a state of its own and no more than torch asks of it."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.sub_(group["lr"] * mean.sign())


def grouped(kind, *rates: dict) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Makes an optimizer with a group for the weights, and one for the rest."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        parts = [[p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]]
        return kind([{"params": part, **rate} for part, rate in zip(parts, rates, strict=True)], lr=0.1)

    return make


BASES = {
    "SGD": grouped(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.02, "momentum": 0.5}),
    "AdamW": grouped(torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.0}),
    "not torch's": grouped(SignDescent, {"lr": 0.03}, {"lr": 0.01}),
}


@every
@pytest.mark.parametrize("base", BASES)
def test_the_base_steps_as_by_itself_with_the_gradient_it_is_left(name, base):
    training, gradients = Training(name, base=BASES[base]), []
    training.optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: gradients.append([parameter.grad.clone() for parameter in training.model.parameters()])
    )
    twin = network().double()
    alone = BASES[base](twin)
    training.step(5)
    for step in gradients:
        for parameter, gradient in zip(twin.parameters(), step, strict=True):
            parameter.grad = gradient
        alone.step()
    assert len(gradients) == 5
    assert_same(list(training.model.parameters()), list(twin.parameters()))


@every
def test_groups_are_perturbed_as_one(name):
    """The length is rho over all of them together."""

    def apart(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-3)

    ours, whole = Training(name, base=apart), Training(name, base=sgd)
    assert ours.step(4) == whole.step(4)
    assert_same(ours.model.state_dict(), whole.model.state_dict())


@every
def test_frozen_and_unused_parameters_change_nothing_beside_tied_ones(name):
    """`Net` has all three."""

    def trained(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad and p is not model.unused]

    def only(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(trained(model), lr=0.1, momentum=0.9, weight_decay=0.1)

    def everything(model: nn.Module) -> torch.optim.Optimizer:
        parameters = [*trained(model), model.unused, model.head.bias]
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)

    networks = []
    for _ in range(3):
        torch.manual_seed(0)
        networks.append(Net().double())
    ours, theirs = Training(name, networks[0], base=everything), Training(name, networks[1], base=only)
    assert ours.step(5) == theirs.step(5)
    assert_same(ours.model.state_dict(), theirs.model.state_dict())
    assert_same([networks[0].unused, networks[0].head.bias], [networks[2].unused, networks[2].head.bias])
    assert not torch.equal(networks[0].first.weight, networks[2].first.weight)


@pytest.mark.parametrize("beta", [0.3, 0.6, 1.0])
def test_esam_costs_one_copy_of_the_tensors_that_it_keeps(beta):
    count, alive, moved = 10, [], []
    side = 150 + int(10 * beta)  # what another case has left is of another size
    weights = [nn.Parameter(torch.randn(side, side, dtype=torch.float64)) for _ in range(count)]
    start = [float(weight.detach()[0, 0]) for weight in weights]
    optimizer = flatmin.ESAM(torch.optim.SGD(weights, lr=0.1), rho=20.0, beta=beta, gamma=1.0)

    def losses(keep: object) -> torch.Tensor:
        real = (torch.Tensor, nn.Parameter)
        large = [t for t in gc.get_objects() if type(t) in real and t.device.type == "cpu"]
        alive.append(len({t.untyped_storage().data_ptr() for t in large if t.nbytes == side * side * 8}))
        moved.append(sum(float(weight.detach()[0, 0]) != value for weight, value in zip(weights, start, strict=True)))
        return torch.stack([weight.square().sum() for weight in weights]).sum().expand(4)[keep]

    optimizer.step(losses)
    assert alive == [count, count + moved[1]]
    assert 0 < moved[1] <= count
    assert moved[1] < count or beta == 1
