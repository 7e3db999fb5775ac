"""MESA's average as a graph on a stream of its own: what it makes, when it runs, and where it is given up.

`tests.side.Late` stands for the GPU: a graph is a list of operations at fixed addresses, replayed when it is awaited.
"""

import copy
import inspect
import io
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.averages import EMA
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.losses import _captured, _side
from tests.host_reads import DEVICE, HostReads
from tests.side import Late

C = 3


@pytest.fixture
def side(monkeypatch):
    """Makes the CPU record from the first pass on, beside the training."""

    def on(*, late: bool = True, after: int = 1) -> Late:
        made = Late(late=late)
        monkeypatch.setitem(_side.SIDES, "cpu", made)
        monkeypatch.setattr(_captured, "AFTER", after)
        return made

    return on


def network() -> nn.Sequential:
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8))
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        spectral,
        nn.LayerNorm(8),
    )
    return nn.Sequential(*layers, nn.Linear(8, C))


def trained(
    steps: int = 5, *, prepare: bool = False, optimizer=None, average=None, side=None, precision=None, **arguments
) -> list[torch.Tensor]:
    """Losses of some steps, and the weights and the average's after them."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    made = base if optimizer is None else optimizer(base)
    given = {"decay": 0.9} if average is None else {"average": average(model)}
    mesa = flatmin.MESA(model, start_epoch=0, **given, **arguments)
    (mesa if average is None else given["average"]).attach(base)
    if mesa.statistics == "fresh":
        mesa.refresh([torch.ones(2, 1, 4, 4)])
    if side is not None:
        model.register_forward_hook(lambda *_: side.events.append("network"))
    losses = []

    def closure():
        made.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            if prepare:
                mesa.prepare(x)
            logits = model(x)
            penalty = mesa(logits, x)
        losses.append(penalty.detach())
        loss = F.cross_entropy(logits.float(), y) + penalty
        loss.backward()
        return loss

    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 1, 4, 4, generator=random), torch.randint(C, (6,), generator=random)
        made.step(closure)
    return [*losses, *model.state_dict().values(), *mesa.average.state_dict().values()]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


WAYS = {
    "plain": {},
    "fraction": {"fraction": 0.5},
    "interval": {"interval": 2},
    "the batch's statistics": {"statistics": "batch"},
    "fresh statistics": {"statistics": "fresh"},
    "low precision": {"autocast": torch.bfloat16},
    "under autocast": {"precision": torch.bfloat16},
    "SAM": {"optimizer": lambda base: flatmin.SAM(base), "fraction": 0.5},
    "an average that is given": {"average": lambda model: EMA(model, decay=0.9)},
    "two outputs": {"output": lambda out: {"a": [out, None]}, "distance": lambda a, b: (a - b["a"][0]).square().mean()},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_steps_are_bit_identical_to_those_without(way, side):
    plain = trained(**way)
    for late, prepare in ((True, True), (True, False), (False, True)):
        beside = side(late=late)
        assert_equal(trained(prepare=prepare, **way), plain)
        assert beside.events.count("record") == 1
        assert beside.events.count("replay") == sum(bool(loss) for loss in plain[: plain_losses(way)])


def plain_losses(way) -> int:
    return 10 if "optimizer" in way else 5


def test_the_average_is_launched_before_the_network_and_waited_for_after_it(side):
    beside = side()
    trained(2, prepare=True, side=beside)
    assert beside.events[-4:] == ["launch", "network", "join", "replay"]
    beside = side()
    trained(2, side=beside)
    assert beside.events[-4:] == ["network", "launch", "join", "replay"]


def test_all_that_crosses_between_the_streams_is_told_to_the_allocator(side):
    beside = side()
    model = network()
    mesa, x = flatmin.MESA(model, start_epoch=0), torch.randn(6, 1, 4, 4)
    mesa.prepare(x)
    assert any(each is x for each in beside.crossed[0])
    assert not beside.crossed[1]
    mesa(model(x), x)
    (out,) = beside.crossed[1]
    assert out.shape == (6, C)
    assert any(out is each() for each in beside.own)


def test_targets_outlive_the_next_pass(side):
    """The graph writes to its outputs again before the backward pass of an earlier loss reads them."""

    def gradients():
        model = network().eval()
        mesa = flatmin.MESA(model, start_epoch=0)
        with torch.no_grad():
            for parameter in mesa.average.parameters():
                parameter += 0.1
        first, second = torch.ones(6, 1, 4, 4), torch.zeros(6, 1, 4, 4)
        (mesa(model(first), first) + mesa(model(second), second)).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients()
    side()
    assert_equal(gradients(), plain)


def mesa_and_batch(**arguments):
    model = network()
    mesa = flatmin.MESA(model, start_epoch=0, **arguments)
    with torch.no_grad():
        for parameter in mesa.average.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model.eval(), mesa, torch.randn(6, 1, 4, 4)


def change_weights(mesa):
    mesa.average.module[0].weight.data = mesa.average.module[0].weight.data.clone() * 2


def change_in_place(mesa):
    mesa.average.load_state_dict({name: value * 2 for name, value in mesa.average.state_dict().items()})


def change_structure(mesa):
    mesa.average.module[-1] = nn.Linear(8, C).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "records"), [(change_weights, 2), (change_in_place, 1), (change_structure, 2)], ids=lambda x: str(x)[:25]
)
def test_what_becomes_of_the_average_is_seen_even_after_the_pass_was_started(change, records, side):
    beside = side()
    model, mesa, x = mesa_and_batch()
    mesa(model(x), x)
    mesa.prepare(x)
    change(mesa)
    got = mesa(model(x), x)
    expected = mesa._comparison.loss(model(x), mesa.average(x), None, mesa.temperature) * mesa.coefficient
    assert torch.equal(got, expected)
    assert beside.events.count("record") == records


def test_other_inputs_than_were_prepared_are_said_once_and_not_used(side):
    side()
    model, mesa, x = mesa_and_batch()
    expected = mesa(model(x), x)
    changed = x.clone()

    def in_place():
        mesa.prepare(changed.fill_(1))
        changed.copy_(x)
        return mesa(model(changed), changed)

    def other():
        mesa.prepare(x + 1)
        return mesa(model(x), x)

    def other_precision():
        with torch.autocast("cpu", torch.bfloat16):
            mesa.prepare(x)
        return mesa(model(x), x)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert all(torch.equal(way(), expected) for way in (in_place, other, other_precision))
    (message,) = [str(each.message) for each in said if each.category is FlatminWarning]
    assert "give it what mesa(logits, ...) is given" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesa.prepare(x + 1)  # a network that failed
        mesa.prepare(x)
        assert torch.equal(mesa(model(x), x), expected)


def test_calls_that_were_prepared_are_counted_once(side):
    side()
    model, mesa, x = mesa_and_batch(interval=2)
    for _ in range(3):
        mesa.prepare(x)
        mesa.prepare(x)
        mesa(model(x), x)
    assert int(mesa.get_extra_state()[1]) == 3
    with torch.no_grad():
        mesa.prepare(x)
    mesa.eval().prepare(x)
    assert int(mesa.get_extra_state()[1]) == 3


class Reads(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 1e9 else super().forward(x) * 2


class Draws(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class Raises(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += not self.training
        if self.calls == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().forward(x)


def hooked(model):
    model.register_forward_hook(lambda *_: None)


CANNOT = {
    "reads": (Reads(2, C), None, "reads values"),
    "draws": (Draws(2, C), None, "random numbers in evaluation mode"),
    "raises": (Raises(2, C), None, "RuntimeError: operation not permitted"),
    "hooks": (nn.Linear(2, C), hooked, "forward hooks"),
    "several devices": (nn.Linear(2, C), lambda net: net.register_buffer("m", torch.ones(1, device="meta")), "devices"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_a_network_that_cannot_be_recorded_runs_as_ever_and_the_reason_is_said_once(name, side):
    layer, change, why = CANNOT[name]
    beside = side()
    model, x = copy.deepcopy(layer), torch.randn(4, 2)
    mesa = flatmin.MESA(model, start_epoch=0)
    if change is not None:
        change(mesa.average.module)
    before = torch.get_rng_state()
    with pytest.warns(FlatminWarning, match=f"without a CUDA graph.*{why}.*capture=False"):
        mesa.prepare(x)
    assert torch.equal(torch.get_rng_state(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        got = mesa(model(x), x)
        torch.manual_seed(1)
        off = copy.deepcopy(mesa)
        off.capture = False
        assert torch.equal(off(model(x), x), got)
    assert "replay" not in beside.events


def test_inputs_of_other_kinds(side):
    class Takes(nn.Linear):
        def forward(self, batch, *, scale=1.0, extra=None):
            return super().forward(batch["x"]) * scale

    beside = side()
    model = Takes(2, C)
    mesa = flatmin.MESA(model, start_epoch=0)
    batch = {"x": torch.randn(4, 2)}
    for scale in (1.0, 1.0, 2.0):
        mesa(model(batch, scale=scale), batch, scale=scale)
    assert beside.events.count("record") == 2  # a number is a part of the graph
    with pytest.warns(FlatminWarning, match="its inputs hold a object"):
        mesa(model(batch, extra=object()), batch, extra=object())
    mesa(model(batch), batch, scale=1.0)  # what is recorded stays
    assert beside.events[-1] == "replay"


def test_a_graph_keeps_what_it_uses_and_the_network_lets_go(side):
    """Such as a table that it makes in its first pass, and longer ones later."""

    class Tabled(nn.Linear):
        table = torch.zeros(0)

        def forward(self, x):
            if len(self.table) < len(x):
                self.table = torch.arange(len(x), dtype=torch.float32)
            return super().forward(x) + self.table[: len(x), None]

    beside = side()
    model = Tabled(2, C)
    mesa = flatmin.MESA(model, start_epoch=0)
    short, long = torch.randn(4, 2), torch.randn(8, 2)
    for x in (short, long, short):
        expected = mesa._comparison.loss(model(x), mesa.average(x), None, mesa.temperature) * mesa.coefficient
        assert torch.equal(mesa(model(x), x), expected)
    assert beside.events.count("record") == 2


def test_shapes_that_keep_changing_are_given_up_and_recordings_are_bounded(side):
    model = nn.Linear(2, C)

    def said(mesa, sizes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for size in sizes:
                x = torch.randn(size, 2)
                mesa(model(x), x)
        return [str(each.message) for each in caught]

    beside = side(after=3)
    (message,) = said(flatmin.MESA(model, start_epoch=0), range(1, 80))
    assert "ever new shapes" in message
    assert not beside.events
    beside = side(after=3)
    mesa = flatmin.MESA(model, start_epoch=0)
    assert not said(mesa, [8, 8, 3] * 3)  # the last batch of an epoch is smaller
    assert beside.events.count("record") == 2
    beside = side()
    (message,) = said(mesa := flatmin.MESA(model, start_epoch=0), range(1, 20))
    assert "many shapes" in message
    assert beside.events.count("record") == _captured.MOST
    before = beside.events.count("replay")
    assert not said(mesa, [1])
    assert beside.events.count("replay") == before + 1


def test_copies_and_pickles_record_for_themselves(side):
    beside = side()
    model, x = nn.Linear(2, C), torch.randn(4, 2)
    mesa = flatmin.MESA(model, start_epoch=0)
    mesa(model(x), x)
    mesa.prepare(x)
    names = set(mesa.state_dict())
    for other in (copy.deepcopy(mesa), pickle.loads(pickle.dumps(mesa))):
        assert torch.equal(other(model(x), x), mesa(model(x), x))
        assert set(other.state_dict()) == names
    assert beside.events.count("record") == 3
    torch.save(mesa.state_dict(), io.BytesIO())


def test_the_argument():
    model = nn.Linear(2, C)
    with pytest.raises(InvalidArgumentError, match="capture=True needs a model on CUDA, got one on cpu: leave capture"):
        flatmin.MESA(model, capture=True)
    for wrong in ("yes", 1, 0.0):
        with pytest.raises(InvalidArgumentError, match="capture must be True, False or None"):
            flatmin.MESA(model, capture=wrong)


def test_what_is_recorded_is_asked_for(side):
    for capture, records in ((None, 1), (True, 1), (False, 0)):
        beside = side()
        model, mesa, x = mesa_and_batch(capture=capture)
        mesa.prepare(x)
        mesa(model(x), x)
        assert beside.events.count("record") == records


def test_the_host_never_waits(monkeypatch):
    monkeypatch.setattr(_captured, "AFTER", 1)
    with HostReads() as accelerator:
        beside = Late(DEVICE.type)
        monkeypatch.setitem(_side.SIDES, DEVICE.type, beside)
        model = nn.Linear(2, C).to(DEVICE)
        mesa = flatmin.MESA(model, start_epoch=0, decay=0.9, fraction=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mesa.attach(optimizer)
        for _ in range(3):
            x = torch.randn(4, 2).to(DEVICE)
            with accelerator.refused():
                mesa.prepare(x)
                mesa(model(x), x).backward()
                optimizer.step()
    assert beside.events.count("replay") == 3


def test_cuda_is_asked_in_the_order_that_keeps_memory_safe(monkeypatch):
    """Against torch.cuda's own signatures, on a machine without a GPU."""
    said = []

    def known(name, returned=None):
        signature = inspect.signature(getattr(torch.cuda, name))

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            said.append(name)
            return returned() if callable(returned) else returned

        monkeypatch.setattr(torch.cuda, name, call)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

        def record_event(self):
            said.append(f"event on {self.name}")
            return "event"

    @contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    @contextmanager
    def entered(name):
        said.append(name)
        yield
        said.append(f"{name} ends")

    inspect.signature(torch.cuda.Stream.__new__).bind(torch.cuda.Stream, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    known("current_stream", lambda: Stream("current"))
    known("graph_pool_handle", "pool")
    known("is_current_stream_capturing", False)
    known("get_sync_debug_mode", 1)
    known("set_sync_debug_mode")
    made = inspect.signature(torch.cuda.graph)

    def graph(*args, **kwargs):
        given = made.bind(*args, **kwargs).arguments
        assert (given["pool"], given["stream"].name, given["capture_error_mode"]) == ("pool", "side", "thread_local")
        return entered("graph")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered("device"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda self: said.append("replay")}))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: said.append("clear"), raising=False)

    class Told:
        def __init__(self, name):
            self.name = name

        def record_stream(self, stream):
            said.append(f"{self.name} is used on {stream.name}")

    cuda = _side.Cuda(torch.device("cuda:0"))
    assert not cuda.busy()
    assert not cuda.takes(torch.ones(1))
    said.clear()
    mark = cuda.launch(lambda: said.append("work"), [Told("input")])
    waits = ["current_stream", "side waits for current"]
    assert said == [*waits, "on side", "work", "off side", "input is used on side", "event on side"]
    said.clear()
    cuda.join(mark, [Told("output")])
    assert said == ["current_stream", "current waits for event", "output is used on current"]
    said.clear()
    (empty,) = cuda.empty_like([torch.ones(2)])
    assert empty.shape == (2,)
    assert said == ["on side", "off side"]
    said.clear()
    replay, out = cuda.record(lambda: said.append("run") or 7)
    replay()
    inner = ["clear", "graph", "run", "graph ends", "clear"]
    outer = ["graph_pool_handle", "current_stream", "device", "on current"]
    assert said == [*outer, *inner, "off current", "device ends", "replay"]
    assert out == 7
    said.clear()
    cuda.record(lambda: None)
    assert "graph_pool_handle" not in said  # the first graph lives, and they share a pool
    del replay
    said.clear()
    cuda.record(lambda: None)
    assert "graph_pool_handle" in said  # torch refuses a pool whose graphs are all gone
    said.clear()
    with cuda.refusing_waits():
        pass
    assert said == ["get_sync_debug_mode", "set_sync_debug_mode", "set_sync_debug_mode"]
