"""On an accelerator the host does not wait in a step: every optimizer, on the CPU as if its numbers stayed there."""

import contextlib
import copy
import warnings
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim import _dropping, _foreach, _step
from flatmin.optim.schedules import Adaptive, Schedule
from tests.contracts._optimizers import CLOSURES, EVERY, Training, assert_same, network, sgd
from tests.host_reads import DEVICE, HostReads, NoReads


def joined(model):
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [torch.optim.SGD(weights, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01, fused=True)]


BASES = {
    "sgd": sgd,
    "sgd fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, foreach=True),
    "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9),
    "joined": joined,
}
every = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def staying(monkeypatch):
    """Numbers stay where they are, as on an accelerator."""
    for module in (_foreach, _step):
        monkeypatch.setattr(module, "stays", lambda tensors: True)


@contextlib.contextmanager
def waiting():
    """Inside, as on the CPU again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (_foreach, _step):
            patch.setattr(module, "stays", lambda tensors: False)
        yield


READING = [
    *((name, base, {}) for name in EVERY for base in ("sgd", "sgd fused", "adamw fused")),
    *((name, "sgd", {"max_norm": 0.1}) for name in EVERY),
    *((name, "sgd", {"scaling": flatmin.optim.Elementwise()}) for name in EVERY if name != "ASAM"),
]


@pytest.mark.parametrize(("name", "base", "options"), READING)
@pytest.mark.usefixtures("staying")
def test_the_host_reads_nothing_in_a_step(name, base, options):
    training = Training(name, base=BASES[base], given=True, **options)
    step = training.optimizer.step
    training.step(2)  # in the first, the base optimizer makes its state
    with NoReads():
        for _ in range(4):
            step(training.losses if training.own_passes else training.closure)
    assert training.optimizer.skipped_steps == 0


@pytest.mark.usefixtures("staying")
def test_a_read_would_be_found():
    training = Training("SAM")
    training.step(2)
    training.each_pass = lambda: float(training.x.sum())
    with NoReads(), pytest.raises(AssertionError, match="the host reads"):
        training.optimizer.step(training.closure)


ACCELERATED = [
    *((name, "sgd", {}) for name in EVERY),
    *((name, "adamw", {"max_norm": 0.1}) for name in EVERY),
    *((name, "sgd", {"scaling": flatmin.optim.Elementwise()}) for name in ("SAM", "MSAM")),
]


@pytest.mark.parametrize(("name", "base", "options"), ACCELERATED)
def test_on_an_accelerator_nothing_is_mixed_with_main_memory_nor_waited_for(name, base, options, monkeypatch):
    """The accelerator is pretended; a GPU would raise, or copy and wait. Counters of AdamW's are on the host there."""
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    module = SimpleNamespace(Event=lambda: event, current_stream=lambda device: None, is_available=lambda: False)

    def weights(device, refused):
        torch.manual_seed(0)
        layers = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        model = nn.Sequential(*layers).to(device)
        plain = torch.optim.SGD if base == "sgd" else torch.optim.AdamW
        rest = {"momentum": 0.9} if base == "sgd" else {}
        optimizer = EVERY[name](plain(model.parameters(), lr=0.01, foreach=True, **rest), rho=0.1, **options)
        x, y = torch.randn(16, 5).to(device), torch.randint(3, (16,)).to(device)

        def losses(keep):
            return nn.functional.cross_entropy(model(x[keep]), y[keep], reduction="none")

        def closure():
            optimizer.zero_grad()
            loss = losses(slice(None)).mean()
            loss.backward()
            return loss

        for step in range(5):
            with refused() if step > 1 else contextlib.nullcontext():
                optimizer.step(losses if optimizer.per_sample_closure else closure)
        return [each.detach().to("cpu") for each in model.parameters()]

    here = weights(torch.device("cpu"), contextlib.nullcontext)
    monkeypatch.setattr(_foreach, "_READ", ("cpu", "mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with HostReads() as accelerator:
        there = weights(DEVICE, accelerator.refused)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Counted(TorchDispatchMode):
    """How often the host asks torch for something inside."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "base", "most"),
    [("SAM", "sgd", 5), ("SAM", "adamw", 10), ("SAM", "sgd fused", 1), ("MSAM", "sgd fused", 1)],
)
@pytest.mark.usefixtures("staying")
def test_a_step_is_launched_over_lists(name, base, most):
    """A tensor more costs the host few calls: small networks train on a GPU as fast as it can launch their kernels."""

    def calls(layers, around):
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
        plain = BASES[base](model)
        optimizer = EVERY[name](plain, rho=0.1) if around else plain

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 2)).square().sum()
            loss.backward()
            return loss

        def step():
            if around:
                optimizer.step(closure)
            else:
                deque((closure() for _ in range(EVERY[name].max_passes)), maxlen=0)
                plain.step()

        for _ in range(3):
            step()
        with Counted() as counted:
            step()
        return counted.calls

    own = {layers: calls(layers, True) - calls(layers, False) for layers in (2, 12)}
    assert (own[12] - own[2]) / 20 <= most


ALIKE = [
    *((name, base, {}) for name in EVERY for base in BASES),
    *((name, "sgd", {"max_norm": 0.1}) for name in EVERY),
    *((name, "sgd", {"when": flatmin.optim.Every(3)}) for name in EVERY if EVERY[name].max_passes == 2),
]


@pytest.mark.parametrize(("name", "base", "options"), ALIKE)
def test_it_makes_the_step_of_one_that_waits(name, base, options, staying):
    ours, theirs = (Training(name, base=BASES[base], **options) for _ in range(2))
    losses = ours.step(6)
    with waiting():
        assert losses == pytest.approx(theirs.step(6), rel=1e-9)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def drop(training, number, ways="closure"):
    """A step whose ``number``-th pass, from 1, is not finite."""
    training.factor = {training.passes + number: float("inf")}
    training.step() if ways == "closure" else training.loop()


DROPPED = [
    (name, base, number, way)
    for name in EVERY
    for number in range(1, EVERY[name].max_passes + 1)
    for base, way in [*((base, "closure") for base in BASES), ("sgd", "passes")]
    if way == "closure" or name in CLOSURES
]


@pytest.mark.parametrize(("name", "base", "number", "way"), DROPPED)
@pytest.mark.usefixtures("staying")
def test_of_a_step_that_is_not_finite_nothing_is_left(name, base, number, way):
    """Weights, buffers, the base optimizer's state and the method's own are those of a twin that left it out."""
    options = {"when": lambda step: True} if name == "LookSAM" else {}
    ours, twin = (Training(name, base=BASES[base], given=True, **options) for _ in range(2))
    for training in (ours, twin):
        training.step(3)
    drop(ours, number, way)
    weights = {key: value.clone() for key, value in ours.model.state_dict().items()}
    assert_same(weights, dict(twin.model.state_dict()))  # at once
    with pytest.warns(NonFiniteGradientWarning, match="a gradient of the last"):
        ours.step()  # a step later
    if EVERY[name].per_sample_closure:  # ESAM draws by the index of the step, which the host did not know yet
        return
    twin.step()
    assert ours.optimizer.skipped_steps == 1
    assert_same(ours.state(), twin.state())
    for training in (ours, twin):
        training.step(2)
    assert_same(ours.state(), twin.state())


@pytest.mark.usefixtures("staying")
@pytest.mark.parametrize("read", ["skipped_steps", "step_dropped", "state_dict", "copy", "load"])
def test_whoever_asks_waits_and_knows(read):
    training = Training("SAM")
    training.step(3)
    before = training.state()
    drop(training, 2)
    ask = {
        "state_dict": lambda: assert_same(training.optimizer.state_dict(), before["optimizer"]),
        "copy": lambda: copy.deepcopy(training.optimizer),
        "load": lambda: training.optimizer.load_state_dict(before["optimizer"]),
    }
    with pytest.warns(NonFiniteGradientWarning):
        assert ask.get(read, lambda: getattr(training.optimizer, read))() != 0
    assert training.optimizer.skipped_steps == 1
    training.step()
    assert not training.optimizer.step_dropped


@pytest.mark.usefixtures("staying")
def test_counters_on_the_host_are_put_back_too(monkeypatch):
    """Those of foreach optimizers, such as AdamW's steps."""
    monkeypatch.setattr(_dropping, "_is_on_host", lambda tensor, flag: tensor.ndim == 0)
    ours, twin = (Training("SAM", base=BASES["adamw"]) for _ in range(2))
    for training in (ours, twin):
        training.step(3)
    drop(ours, 1)
    with pytest.warns(NonFiniteGradientWarning):
        ours.step()
    twin.step()
    assert_same(ours.state(), twin.state())
    assert {float(state["step"]) for state in ours.optimizer.state.values()} == {4.0}


class Foreign(torch.optim.SGD):
    """An optimizer that is not torch's own: nobody knows what it remembers."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.made = 0

    def step(self, closure=None):
        self.made += 1
        return super().step(closure)


@every
@pytest.mark.usefixtures("staying")
def test_a_base_that_is_not_torchs_is_waited_for(name):
    training = Training(name, base=lambda model: Foreign(model.parameters(), lr=0.1, momentum=0.9))
    training.step(3)
    before = training.state()
    with pytest.warns(NonFiniteGradientWarning):
        drop(training, 1)
    assert training.optimizer.step_dropped
    assert training.optimizer.base_optimizer.made == 3
    assert_same(training.state()["model"], before["model"])


@pytest.mark.usefixtures("staying")
def test_the_first_step_is_waited_for():
    """After which there is a state that there was not."""
    training = Training("SAM", base=BASES["sgd"])
    with pytest.warns(NonFiniteGradientWarning, match="the second gradient"):
        drop(training, 2)
    assert not training.optimizer.state
    training.step()
    assert training.optimizer.state


@pytest.mark.usefixtures("staying")
def test_so_is_one_with_parameters_that_are_new():
    training = Training("SAM", base=BASES["adamw"])
    training.model[4].requires_grad_(False)
    training.step(3)
    training.model[4].requires_grad_(True)
    with pytest.warns(NonFiniteGradientWarning, match="the second gradient"):
        drop(training, 2)
    assert training.model[4].weight not in training.optimizer.state


class Watching(Schedule):
    """Decides by the norm, and remembers all of them."""

    def __init__(self):
        self.norms = []

    def before(self, step):
        return None

    def after(self, step, gradient_norm):
        assert isinstance(gradient_norm, float)
        return step % 2 == 0

    def observe(self, step, gradient_norm):
        self.norms.append(gradient_norm)

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state_dict):
        self.norms = state_dict["norms"]


def test_schedules_get_numbers(staying):
    ours, theirs = (Training("SAM", when=Watching()) for _ in range(2))
    ours.step(5)
    with waiting():
        theirs.step(5)
    assert ours.optimizer._when.norms == pytest.approx(theirs.optimizer._when.norms, rel=1e-9)
    assert ours.passes == theirs.passes == 8


def test_adaptive_decides_alike(staying):
    ours, theirs = (Training("GSAM", when=Adaptive(20)) for _ in range(2))
    ours.step(20)
    with waiting():
        theirs.step(20)
    assert ours.passes == theirs.passes
    assert 20 < ours.passes < 40


@pytest.mark.parametrize("name", [name for name in CLOSURES if EVERY[name].max_passes == 2])
@pytest.mark.usefixtures("staying")
def test_a_closure_that_adds_is_found_a_step_later(name):
    training = Training(name)
    training.step(3)
    weights = copy.deepcopy(training.model.state_dict())
    clear, training.optimizer.zero_grad = training.optimizer.zero_grad, lambda: None
    training.step()
    assert_same(dict(training.model.state_dict()), dict(weights))
    training.optimizer.zero_grad = clear
    with pytest.raises(InvalidArgumentError, match="adds to gradients that were there"):
        training.step()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.usefixtures("staying")
def test_averages_see_no_weights_that_are_put_back(around):
    training = Training("SAM")
    ema = flatmin.EMA(training.model, decay=0.5)
    ema.attach(training.optimizer if around else training.optimizer.base_optimizer)
    training.step(3)
    drop(training, 1)
    assert all(parameter.isfinite().all() for parameter in ema.module.parameters())
    assert all(buffer.isfinite().all() for buffer in ema.module.buffers())


@every
@pytest.mark.usefixtures("staying")
def test_buffers_that_a_dropped_pass_has_moved_are_put_back(name):
    model = network()
    training = Training(name, model, given=True)
    training.step(3)
    before = copy.deepcopy(dict(model.named_buffers()))
    training.x[0] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteGradientWarning)
        training.step()
    assert_same(dict(model.named_buffers()), before)


@pytest.mark.usefixtures("staying")
def test_resuming_is_bit_identical():
    """The first step afterwards is waited for, and its numbers are the same."""
    for name in EVERY:
        whole = Training(name, network().float(), dtype=torch.float32)
        whole.step(4)
        state = whole.state()
        whole.step(3)
        second = Training(name, network().float(), dtype=torch.float32)
        second.model.load_state_dict(state["model"])
        second.optimizer.load_state_dict(state["optimizer"])
        second.step(3)
        assert_same(second.state(), whole.state())


def test_flags_are_awaited_on_the_stream_of_their_device(monkeypatch):
    """Which the current device need not be: its stream may be done long before."""
    recorded = []

    class Event:
        def record(self, stream):
            recorded.append(stream)

        def synchronize(self):
            recorded.append("synchronize")

    module = SimpleNamespace(Event=Event, current_stream=lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with HostReads():
        flag = torch.tensor(True).to(DEVICE)
        assert _dropping._Flags(flag, flag).read() == (True, True)
    assert recorded == [f"the stream of {DEVICE}", "synchronize"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("flag", [False, True])
def test_bits_are_put_back_whatever_they_are(dtype, flag):
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.5, -3.0, 6.0e4]
    values = torch.tensor(special if dtype.is_floating_point else [0, 1, 5, -3, 2**30, 7, 0, 1], dtype=torch.float64)
    old, new = values.to(dtype), values.flip(0).to(dtype)
    tensors = [new.clone(), new.clone().view(2, 4).t()]
    copies = [old.clone(), old.clone().view(2, 4).t()]
    _foreach.put_back_(tensors, copies, torch.tensor(flag))
    kept = old.clone()
    backup = _foreach.Backup([kept])
    kept.copy_(new)
    backup.put_back_(torch.tensor(flag))
    wanted = old if flag else new
    raw = torch.uint8
    assert torch.equal(kept.view(raw), wanted.view(raw))
    assert torch.equal(tensors[0].view(raw), wanted.view(raw))
    assert torch.equal(tensors[1].t().contiguous().flatten().view(raw), wanted.view(raw))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_on_the_device_is_as_a_number(dtype):
    tensors = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    others = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    for factor in (0.37, 1e-3, 3.0):
        device = torch.tensor(factor, dtype=torch.float64)
        near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        for a, b in zip(_foreach.plus(tensors, others, device), _foreach.plus(tensors, others, factor), strict=True):
            torch.testing.assert_close(a, b, **near)
        ours, theirs = _foreach.clones(tensors), _foreach.clones(tensors)
        _foreach.scale_(ours, device)
        _foreach.scale_(theirs, factor)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **near)


@pytest.mark.usefixtures("staying")
def test_gradients_whose_squares_overflow_are_finite():
    weight = nn.Parameter(torch.ones(3))
    optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=1e-30, momentum=0.9), rho=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight * 1e25).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.skipped_steps == 0
    assert (weight < 1).all()
