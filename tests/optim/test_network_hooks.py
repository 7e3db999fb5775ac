"""When the weights of a loop without a closure are moved, and that they are clean at every other moment."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin.errors import InvalidArgumentError
from tests.contracts._one_pass import ONE_PASS
from tests.contracts._optimizers import EVERY, assert_same


class Net(nn.Module):
    """Calls ``inside`` with itself in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.last.bias = nn.Parameter(torch.ones(2))
        self.tied = self.first
        self.inside: Callable[[Net], None] = no_op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.last(torch.tanh(self.first(x)))
        self.inside(self)
        return out


def no_op(_: object) -> None:
    pass


X = torch.linspace(-1, 1, 15).reshape(5, 3).double()


class Moments:
    """A network after two steps, so that the next pass is at moved weights."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.net = Net().double()
        base = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = EVERY[name](base, rho=0.3, model=self.net)
        for _ in range(2):
            self.step()
        self.clean = self.now()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> torch.Tensor:
        return self.net(X).square().mean()

    def now(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]

    def is_clean(self) -> bool:
        return all(map(torch.equal, self.net.parameters(), self.clean))

    def is_moved(self) -> bool:
        """By rho, to where `point` is."""
        length = sum((a - b).square().sum() for a, b in zip(self.net.parameters(), self.clean, strict=True)).sqrt()
        return float(length.detach()) == pytest.approx(0.3)


@pytest.fixture(params=ONE_PASS)
def moments(request: pytest.FixtureRequest) -> Moments:
    return Moments(request.param)


def test_moved_from_the_forward_to_the_end_of_the_backward_pass(moments):
    seen = []
    moments.net.inside = lambda _: seen.append(moments.is_moved())
    assert moments.is_clean()
    for _ in range(3):
        loss = moments.loss()
        assert moments.is_moved()
        moments.net.first.weight.register_hook(lambda _: seen.append(moments.is_moved()))
        loss.backward()
        assert moments.is_clean()
    assert len(seen) == 3 + (1 + 2 + 3)
    assert all(seen)
    moments.optimizer.step()
    assert not moments.is_clean()


def test_graphs_in_all_orders(moments):
    """The weights are moved as long as a backward pass may come, and clean when none can."""
    first, second = moments.loss(), moments.loss()
    second.backward()
    assert moments.is_moved()
    first.backward(retain_graph=True)
    assert moments.is_moved()
    first.backward()
    assert moments.is_clean()

    dropped = moments.loss()
    assert moments.is_moved()
    del dropped
    assert moments.is_clean()

    first = moments.loss()
    first = moments.loss()
    first.backward()
    assert moments.is_clean()

    (torch.autograd.grad(moments.loss(), list(moments.net.parameters())))
    assert moments.is_clean()
    moments.loss().item(), moments.loss().detach()
    assert moments.is_clean()
    kept = moments.loss()
    moments.optimizer.zero_grad()
    moments.loss().backward()
    assert moments.is_moved()
    moments.optimizer.step()
    moments.clean = moments.now()
    del kept
    assert moments.is_clean()
    moments.step()


def reads(moments: Moments) -> dict[str, Callable[[], object]]:
    """All that looks at the weights from outside; returns them in their order."""
    net = moments.net

    def in_evaluation() -> list[torch.Tensor]:
        seen = []
        net.inside = lambda _: seen.append(moments.now())
        net.eval()
        with torch.no_grad():
            net(X)
        net.train()
        net.inside = no_op
        return seen[0]

    def without_gradients() -> list[torch.Tensor]:
        seen = []
        net.inside = lambda _: seen.append(moments.now())
        with torch.no_grad():
            net(X)
        with torch.inference_mode():
            net(X)
        net.inside = no_op
        assert_same(seen[0], seen[1])
        return seen[0]

    def values(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        order = [name for name, _ in net.named_parameters()]
        assert torch.equal(state["tied.weight"], state["first.weight"])
        return [state[name].detach() for name in order]

    def saved() -> list[torch.Tensor]:
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        return values(torch.load(io.BytesIO(file.getvalue()), weights_only=True))

    def by_a_wrapper() -> list[torch.Tensor]:
        outer = nn.ModuleDict({"inner": nn.ModuleList([net])})
        return values({name.removeprefix("inner.0."): value for name, value in outer.state_dict().items()})

    def whole() -> list[torch.Tensor]:
        file = io.BytesIO()
        torch.save(net, file)
        return [p.detach() for p in torch.load(io.BytesIO(file.getvalue()), weights_only=False).parameters()]

    def copied(copies: Callable[[nn.Module], nn.Module]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [parameter.detach() for parameter in copies(net).parameters()]

    def optimizer_copied() -> list[torch.Tensor]:
        groups = copy.deepcopy(moments.optimizer).param_groups
        return [parameter.detach() for group in groups for parameter in group["params"]]

    return {
        "evaluation": in_evaluation,
        "no_grad": without_gradients,
        "state_dict": lambda: values(net.state_dict()),
        "keep_vars": lambda: values(net.state_dict(keep_vars=True)),
        "saved": saved,
        "wrapper": by_a_wrapper,
        "averaged": copied(lambda net: torch.optim.swa_utils.AveragedModel(net)),
        "deepcopy": copied(copy.deepcopy),
        "pickle": copied(lambda net: pickle.loads(pickle.dumps(net))),
        "torch.save": whole,
        "optimizer": optimizer_copied,
    }


def within_forward(moments: Moments, look: Callable[[], None]) -> object:
    moments.net.inside = lambda net: (setattr(net, "inside", no_op), look())
    return moments.loss()


def after_forward(moments: Moments, look: Callable[[], None]) -> object:
    loss = moments.loss()
    assert moments.is_moved()
    look()
    return loss


def after_backward(moments: Moments, look: Callable[[], None]) -> None:
    moments.loss().backward()
    look()
    assert moments.is_clean()


def after_a_retained_graph(moments: Moments, look: Callable[[], None]) -> object:
    loss = moments.loss()
    loss.backward(retain_graph=True)
    look()
    return loss


def after_a_failed_forward(moments: Moments, look: Callable[[], None]) -> None:
    def fail(_: object) -> None:
        raise ArithmeticError

    moments.net.inside = fail
    with pytest.raises(ArithmeticError):
        moments.loss()
    moments.net.inside = no_op
    assert moments.is_clean()
    look()


def after_an_interrupted_forward(moments: Moments, look: Callable[[], None]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    moments.net.inside = interrupt
    with pytest.raises(KeyboardInterrupt):
        moments.loss()
    moments.net.inside = no_op
    look()


def after_an_interrupted_evaluation(moments: Moments, look: Callable[[], None]) -> object:
    loss = moments.loss()
    with torch.no_grad():
        after_an_interrupted_forward(moments, lambda: None)
    look()
    return loss


def failed_backward(moments: Moments, look: Callable[[], None], error: type[BaseException]) -> None:
    def fail(_: object) -> None:
        raise error

    loss = moments.loss()
    hook = moments.net.first.weight.register_hook(fail)
    with pytest.raises(error):
        loss.backward()
    hook.remove()
    assert moments.is_clean()
    look()


def after_a_failed_backward(moments: Moments, look: Callable[[], None]) -> None:
    failed_backward(moments, look, ArithmeticError)


def after_an_interrupted_backward(moments: Moments, look: Callable[[], None]) -> None:
    failed_backward(moments, look, KeyboardInterrupt)


def after_perturb(moments: Moments, look: Callable[[], None]) -> None:
    moments.optimizer.perturb()
    assert moments.is_moved()
    look()


WHEN = [
    within_forward,
    after_forward,
    after_backward,
    after_a_retained_graph,
    after_a_failed_forward,
    after_an_interrupted_forward,
    after_an_interrupted_evaluation,
    after_a_failed_backward,
    after_an_interrupted_backward,
    after_perturb,
]
LOOKS = list(reads(Moments(ONE_PASS[0])))


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ONE_PASS)
def test_whoever_looks_from_outside_sees_the_clean_weights(name, when):
    """And then the run goes on: a step from here is that of a run in which nobody has looked and nothing failed."""
    other = Moments(name)
    other.step(), other.step()
    for look in LOOKS:
        moments, seen = Moments(name), []
        kept = when(moments, lambda m=moments, s=seen, k=look: s.append([t.clone() for t in reads(m)[k]()]))
        assert_same(seen[0], moments.clean)
        del kept
        moments.step(), moments.step()
        assert_same(moments.now(), other.now())


@pytest.mark.parametrize("look", LOOKS)
def test_a_backward_pass_after_a_look_is_right_or_refused(moments, look):
    other = Moments(type(moments.optimizer).__name__)
    loss = moments.loss()
    reads(moments)[look]()
    if look in ("evaluation", "no_grad", "state_dict", "saved", "wrapper"):
        loss.backward()
        moments.optimizer.step()
        other.step()
        assert_same(moments.now(), other.now())
    elif look == "optimizer":
        with pytest.raises(InvalidArgumentError, match="put back: the optimizer was copied"):
            loss.backward()
    else:
        with pytest.raises(
            InvalidArgumentError, match=r"put back: (the network was copied|a state dict with keep_vars)"
        ):
            loss.backward()


def test_evaluation_with_gradients_in_between(moments):
    """Its graph is of the clean weights, and the pending one is refused."""
    pending = moments.loss()
    moments.net.eval()
    loss = moments.loss()
    moments.net.train()
    assert moments.is_clean()
    loss.backward()
    with pytest.raises(InvalidArgumentError, match="put back: a forward pass in evaluation mode came before it"):
        pending.backward()
    with pytest.raises(InvalidArgumentError, match="put back: a state dict was loaded"):
        pending = moments.loss()
        moments.net.load_state_dict(moments.net.state_dict())
        pending.backward()
    with pytest.raises(InvalidArgumentError, match=r"put back: restore\(\) was called"):
        pending = moments.loss()
        moments.optimizer.restore()
        pending.backward()


def test_what_is_loaded_stays(moments):
    loss = moments.loss()
    other = {name: value + 1 for name, value in moments.net.state_dict().items()}
    moments.net.load_state_dict(other)
    del loss
    moments.optimizer.restore()
    assert_same(dict(moments.net.state_dict()), other)


@pytest.mark.parametrize("way", ["forward", "failed", "interrupted", "kept"])
def test_a_step_puts_the_weights_back_whatever_has_been(moments, way):
    other = Moments(type(moments.optimizer).__name__)
    for each in (moments, other):
        each.loss().backward()
    if way == "failed":
        after_a_failed_forward(moments, lambda: None)
    elif way == "interrupted":
        after_an_interrupted_forward(moments, lambda: None)
    else:
        moments.kept = moments.loss() if way == "kept" else float(moments.loss().detach())
    moments.optimizer.step(), other.optimizer.step()
    assert_same(moments.now(), other.now())
    moments.step(), other.step()
    assert_same(moments.now(), other.now())


def test_functions_of_the_network(moments):
    """torch.func calls it with other weights: nothing stays moved, and what it returns is that of those."""
    del moments.net.tied  # which torch's functional_call would leave replaced
    others = {name: parameter.detach() * 2 for name, parameter in moments.net.named_parameters()}
    found = grad(lambda w: functional_call(moments.net, w, (X,)).square().mean())(others)
    moments.net.eval()
    expected = grad(lambda w: functional_call(moments.net, w, (X,)).square().mean())(others)
    moments.net.train()
    assert_same(found, expected)
    assert moments.is_clean()
    pending = moments.loss()
    assert_same(grad(lambda w: functional_call(moments.net, w, (X,)).square().mean())(others), expected)
    assert moments.is_moved()
    pending.backward()
    assert moments.is_clean()


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced by fx": torch.fx.symbolic_trace,
    "exported": lambda net: torch.export.export(net, (X,)).module(),
    "scripted": torch.jit.script,
    "scripted in another": lambda net: nn.Sequential(torch.jit.script(net)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_networks_that_are_no_python(name, kind):
    results = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        net = KINDS[kind](nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = EVERY[name](base, rho=0.3, model=net)

        def closure(net=net, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            net(X).square().mean().backward()

        if kind == "scripted" and not with_closure:
            closure()
            with pytest.raises(InvalidArgumentError, match="no scripted one"):
                optimizer.step()
            return
        for _ in range(3):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        copied = copy.deepcopy(net)
        assert_same(list(copied.parameters()), list(net.parameters()))
        copied(X).sum().backward()
        results.append([parameter.detach() for parameter in net.parameters()])
        assert_same(list(copied.parameters()), results[-1])
    assert_same(*results)


def test_nothing_waits_and_nothing_is_copied_more_than_with_a_closure(moments):
    """Counted: operations on tensors in a step."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[str(func)] = self.seen.get(str(func), 0) + 1
            return func(*args, **(kwargs or {}))

    def closure() -> None:
        moments.optimizer.zero_grad()
        moments.loss().backward()

    with Count() as plain:
        closure()
        moments.optimizer.step()
    with Count() as with_closure:
        moments.optimizer.step(closure)
    for name in ("aten._local_scalar_dense.default", "aten.clone.default", "aten._foreach_copy_.default"):
        assert plain.seen.get(name, 0) == with_closure.seen.get(name, 0)
    # over three micro-batches there is one wait for the direction's norm, and one for the gradient's
    with Count() as parts:
        for _ in range(3):
            moments.loss().backward()
        moments.optimizer.step()
    waits = "aten._local_scalar_dense.default"
    assert parts.seen[waits] == with_closure.seen[waits]


def test_the_graph_alone_keeps_no_optimizer(moments):
    loss = moments.loss()
    reference = weakref.ref(moments.optimizer)
    moments.optimizer = None
    gc.collect()
    assert reference() is None
    assert moments.is_clean()
    del loss
