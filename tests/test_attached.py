"""What is attached to an optimizer is saved with it, and comes back with it."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.nn import functional as F

import flatmin
from flatmin._attached import KEY
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.optim import SharpnessAware
from tests.contracts._optimizers import EVERY

N, C, EPOCHS, STEPS = 24, 3, 4, 3
generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 4, generator=generator), torch.randint(C, (N,), generator=generator)
LOSSES = {
    "SAF": lambda model: flatmin.SAF(N, C, coefficient=2.0, lag=1, start_epoch=1),
    "SAF lowrank": lambda model: flatmin.SAF(
        N, C, coefficient=2.0, lag=1, start_epoch=1, history=flatmin.history.LowRank(2)
    ),
    "SAF mean": lambda model: flatmin.SAF(N, C, coefficient=2.0, start_epoch=1, history="mean"),
    "MESA": lambda model: flatmin.MESA(model, decay=0.7, start_epoch=0),
    "MESA share": lambda model: flatmin.MESA(model, decay=0.7, start_epoch=0, fraction=0.5, interval=2),
    "OnlineLabelSmoothing": lambda model: flatmin.OnlineLabelSmoothing(C),
}
AVERAGES = {
    "EMA": lambda model: flatmin.EMA(model, decay=0.7),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.7),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
}
MAKERS = {**LOSSES, **AVERAGES}
# Around a plain optimizer or flatmin's, attached to either.
WAYS = ["plain", "to flatmin's", "to the base in flatmin's"]


class Run:
    """A training from the start, or from where another was saved."""

    def __init__(self, name: str, way: str = "plain", **options) -> None:
        torch.manual_seed(1)
        self.name = name
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))
        base = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        self.optimizer = base if way == "plain" else EVERY["SAM" if "SAF" not in name else "MSAM"](base, rho=0.05)
        self.module = MAKERS[name](self.model, **options)
        self.module.attach(base if "base" in way else self.optimizer)
        self.penalties: list[float] = []

    def train(self, epochs: range) -> "Run":
        for epoch in epochs:
            if self.name in LOSSES:
                self.module.set_epoch(epoch)
            order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
            for index in order.chunk(STEPS):
                self.optimizer.step(lambda index=index: self.loss(index))
            if self.name == "LAWA":
                self.module.update()
            elif self.name == "SwitchEMA":
                self.module.switch()
        return self

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        x, y = X[index], Y[index]
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        if self.name in LOSSES:
            beside = {"S": index, "O": y, "M": x}[self.name[0]]
            penalty = self.module(logits, beside)
            self.penalties.append(float(penalty.detach()))
            loss = loss + penalty
        loss.backward()
        return loss

    def saved(self) -> bytes:
        """As a trainer saves: model and optimizer, and nothing of flatmin's own."""
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, state: bytes) -> "Run":
        parts = torch.load(io.BytesIO(state), weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return self


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one(name, way):
    whole, first = Run(name, way).train(range(EPOCHS)), Run(name, way).train(range(2))
    state = first.saved()
    # Attached to what it was not attached to when it was saved: the state fits all the same.
    other = {"plain": "plain", WAYS[1]: WAYS[2], WAYS[2]: WAYS[1]}[way]
    second = Run(name, other).load(state).train(range(2, EPOCHS))
    assert_same(whole.model, second.model)
    assert_same(whole.module, second.module)
    if name in LOSSES:
        assert second.penalties == whole.penalties[len(first.penalties) :]
        assert any(second.penalties)


@pytest.mark.parametrize("name", MAKERS)
def test_the_control_without_the_entry_differs_and_says_so_once(name):
    whole, first = Run(name).train(range(EPOCHS)), Run(name).train(range(2))
    parts = torch.load(io.BytesIO(first.saved()), weights_only=True)
    assert len(parts["optimizer"].pop(KEY)) == 1
    second = Run(name)
    before = copy.deepcopy(second.module.state_dict())
    second.model.load_state_dict(parts["model"])
    kind = name.split()[0]
    with pytest.warns(FlatminWarning, match=rf"has nothing of {kind}, .*what there is was kept") as caught:
        second.optimizer.load_state_dict(parts["optimizer"])
    second.optimizer.load_state_dict(parts["optimizer"])  # warned once
    assert caught[0].filename == __file__
    assert all(torch.equal(before[key], value) for key, value in second.module.state_dict().items())
    second.train(range(2, EPOCHS))
    if name == "SwitchEMA":
        return  # it ends at weights that were equal at both ends of an epoch
    with pytest.raises(AssertionError):
        assert_same(whole.module, second.module)


@pytest.mark.parametrize("name", ["SAF", "MESA", "LAWA"])
def test_it_stands_once_beside_the_optimizers_own_state_in_plain_values(name):
    run = Run(name, WAYS[1]).train(range(1))
    state = run.optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "flatmin", KEY}
    assert list(state[KEY]) == [name]
    assert all(isinstance(value, torch.Tensor) for value in state[KEY][name].values())
    rows = sum(value.nbytes for value in run.module.state_dict().values())
    assert rows < len(run.saved()) < rows + 12_000 + sum(value.nbytes for value in run.model.state_dict().values()) * 3


def test_rows_in_a_file_travel_too(tmp_path):
    run = Run("SAF").train(range(2))
    assert run.module.history.store.rows.any()
    (first, on_disk), (second, again) = ((attached()[0], flatmin.SAF(N, C, lag=1, path=tmp_path)) for _ in range(2))
    on_disk.attach(first)
    on_disk.load_state_dict(run.module.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again.attach(second)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same(again, run.module)
    assert again.history.store.on_host


def attached(*names: str, way: str = "plain") -> tuple[torch.optim.Optimizer, list[nn.Module]]:
    torch.manual_seed(2)
    model = nn.Linear(4, C)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = base if way == "plain" else flatmin.SAM(base)
    modules = [MAKERS[name](model) for name in names]
    for number, module in enumerate(modules):
        module.attach(base if way == "mixed" and number % 2 else optimizer)
    return optimizer, modules


@pytest.mark.parametrize("way", ["plain", "sam", "mixed"])
def test_several_are_told_apart_by_class_and_by_order_within_a_class(way):
    optimizer, (ema, saf, second) = attached("EMA", "SAF", "EMA", way=way)
    nn.init.constant_(ema.module.bias, 1.0)
    nn.init.constant_(second.module.bias, 2.0)
    saf(torch.ones(1, C, requires_grad=True), torch.tensor([5]))
    state = optimizer.state_dict()
    assert set(state[KEY]) == {"EMA", "EMA.1", "SAF"}
    other, (other_saf, other_ema, other_second) = attached("SAF", "EMA", "EMA", way=way)
    other.load_state_dict(state)
    assert other_ema.module.bias[0] == 1
    assert other_second.module.bias[0] == 2
    assert_same(other_saf, saf)


def test_a_module_is_attached_once_however_often_it_is_asked_for():
    optimizer, (ema,) = attached("EMA", way="sam")
    first, second = ema.attach(optimizer), ema.attach(optimizer.base_optimizer)
    assert first is second
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.base_optimizer.step()
    assert ema.n_averaged == 1  # it was attached to the outer one
    first.remove()
    assert KEY not in optimizer.state_dict()
    with ema.attach(optimizer.base_optimizer):
        optimizer.base_optimizer.step()
        assert KEY in optimizer.state_dict()
    optimizer.base_optimizer.step()
    assert ema.n_averaged == 2
    first.remove()  # again: nothing happens


@pytest.mark.parametrize("way", ["plain", "sam"])
def test_an_entry_of_what_is_not_attached_is_left_out_and_said(way):
    state = attached("EMA", "SAF", way=way)[0].state_dict()
    optimizer, _ = attached("SAF", way=way)
    with pytest.warns(FlatminWarning, match="has that of EMA, which is not attached"):
        optimizer.load_state_dict(state)
    assert set(optimizer.state_dict()[KEY]) == {"SAF"}
    assert set(state[KEY]) == {"EMA", "SAF"}  # what was given is not touched
    optimizer, _ = attached(way=way)
    if way == "sam":  # a plain optimizer of torch's, to which nothing is attached, knows nothing of it
        with pytest.warns(FlatminWarning, match="has that of EMA, SAF, which is not attached"):
            optimizer.load_state_dict(state)
    else:
        optimizer.load_state_dict(state)
    assert KEY not in optimizer.state_dict()
    assert "EMA" not in repr(optimizer)


def test_a_state_of_another_history_is_refused_before_anything_is_loaded():
    state = attached("SAF")[0].state_dict()
    optimizer, (ema,) = attached("EMA")
    saf = flatmin.SAF(N + 1, C)
    saf.attach(optimizer)
    state["param_groups"][0]["lr"] = 5.0
    with pytest.raises(InvalidArgumentError, match="has the data set grown"):
        optimizer.load_state_dict({**state, KEY: {**state[KEY], "EMA": ema.state_dict()}})
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", ["SAF", "MESA", "EMA"])
def test_distributed_checkpoint_is_not_disturbed_and_what_it_leaves_out_is_said(name, flatten):
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flatten)
    run = Run(name).train(range(2))
    state = checkpoint.get_optimizer_state_dict(run.model, run.optimizer, options=options)
    other = Run(name)
    with pytest.warns(FlatminWarning, match=f"has nothing of {name}"):
        checkpoint.set_optimizer_state_dict(other.model, other.optimizer, state, options=options)
    momenta = [entry["momentum_buffer"] for entry in run.optimizer.state.values()]
    theirs = [entry["momentum_buffer"] for entry in other.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, theirs, strict=True))


class Held(torch.optim.Optimizer):
    """As accelerate and Opacus wrap: torch's constructor is not called."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = self.original_optimizer = optimizer


@pytest.mark.parametrize("package", ["accelerate.optimizer", "opacus.optimizers.optimizer"])
def test_a_trainers_wrapper_is_looked_through(package):
    wrapper = type("Wrapped", (Held,), {"__module__": package})
    model = nn.Linear(4, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = flatmin.EMA(model, decay=0.5)
    ema.attach(wrapper(wrapper(optimizer)))
    optimizer.step()
    assert ema.n_averaged == 2
    assert KEY in optimizer.state_dict()


@pytest.mark.parametrize("optimizer", [None, "sgd", nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(InvalidArgumentError, match=r"^optimizer must be a torch\.optim\.Optimizer .*, got "):
        flatmin.EMA(nn.Linear(2, 2)).attach(optimizer)


def test_a_wrapper_of_somebody_elses_is_refused_in_a_sentence():
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(InvalidArgumentError, match="got Held; if it wraps another, attach to that one"):
        flatmin.EMA(nn.Linear(2, 2)).attach(Held(inner))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_copies_made_together_are_attached_to_each_other(name, way):
    whole, run = Run(name, way).train(range(EPOCHS)), Run(name, way).train(range(2))
    twin = Run(name, way)
    twin.model, twin.optimizer, twin.module = copy.deepcopy((run.model, run.optimizer, run.module))
    twin.train(range(2, EPOCHS))
    assert_same(whole.model, twin.model)
    assert_same(whole.module, twin.module)
    assert_same(run.module, Run(name, way).train(range(2)).module)  # the first is left alone
    assert KEY in twin.optimizer.state_dict()


@pytest.mark.parametrize("name", ["EMA", "SwitchEMA", "LAWA", "MESA"])
def test_a_copy_that_lost_its_optimizer_says_so_once_its_network_has_gone_on(name):
    run = Run(name).train(range(1))
    twin = Run(name)
    twin.model, twin.module, twin.optimizer = copy.deepcopy((run.model, run.module, run.optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used(twin)  # the copy as it is, to be evaluated for one
        if name != "LAWA":
            twin.module.update()
    twin.model, twin.module, twin.optimizer = copy.deepcopy((run.model, run.module, run.optimizer))
    before = copy.deepcopy(twin.module.state_dict())
    twin.name = "none"
    twin.train(range(1, 2))
    twin.name = name
    with pytest.warns(FlatminWarning, match=f"this {name} is a copy .*attach it"):
        used(twin)
    used(twin)  # warned once
    assert name == "MESA" or all(torch.equal(before[key], value) for key, value in twin.module.state_dict().items())
    twin.module.attach(twin.optimizer)  # the way out
    assert KEY in twin.optimizer.state_dict()


def used(run: Run) -> None:
    if run.name == "MESA":
        run.module(run.model(X), X)
    else:
        run.module(X)


def test_a_pickled_average_is_a_copy_too():
    run = Run("EMA").train(range(1))
    file = io.BytesIO()
    torch.save(run.module, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_same(again, run.module)
    again.attach(torch.optim.SGD(again.model.parameters(), lr=0.1))


@pytest.mark.parametrize("name", [name for name, kind in EVERY.items() if issubclass(kind, SharpnessAware)])
def test_every_optimizer_of_flatmins_carries_it(name):
    model = nn.Linear(4, C)
    make = lambda: EVERY[name](torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)  # noqa: E731
    ema, first = flatmin.EMA(model), make()
    ema.attach(first)
    nn.init.constant_(ema.module.bias, 7.0)
    state = first.state_dict()
    other, second = flatmin.EMA(model), make()
    other.attach(second.base_optimizer)
    second.load_state_dict(state)
    assert_same(ema, other)
    assert "flatmin" in state


def test_nothing_keeps_an_optimizer_alive():
    import gc
    import weakref

    optimizer, (ema,) = attached("EMA")
    handle = ema.attach(optimizer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    handle.remove()
