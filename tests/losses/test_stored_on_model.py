"""Averages and losses that a network holds itself, as a trainer's module does, are no part of the network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import flatmin
from flatmin.errors import InvalidArgumentError

N, C = 24, 3
generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 4, generator=generator), torch.randint(C, (N,), generator=generator)
BESIDE = {
    "MESA": lambda model: flatmin.MESA(model, decay=0.7, start_epoch=0),
    "EMA": lambda model: flatmin.EMA(model, decay=0.7),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.7),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
    "SAF": lambda model: flatmin.SAF(N, C, lag=1, start_epoch=1),
    "OnlineLabelSmoothing": lambda model: flatmin.OnlineLabelSmoothing(C),
}
OF_WEIGHTS = ["MESA", "EMA", "SwitchEMA", "LAWA"]


class Network(nn.Module):
    """Layers, a buffer and batch norm on the module itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, C)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu()) * self.scale


def average_of(beside: nn.Module) -> nn.Module:
    return beside.average.module if isinstance(beside, flatmin.MESA) else beside.module


def train(model: nn.Module, beside: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    losses = []
    for _epoch in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(X)
            loss = F.cross_entropy(logits, Y)
            if isinstance(beside, flatmin.MESA):
                loss = loss + beside(logits, X)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if isinstance(beside, flatmin.LAWA):
            beside.update()
        elif isinstance(beside, flatmin.SwitchEMA):
            beside.switch()
            beside.refresh([X])
    return losses


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("others", [(), ("EMA", "SAF", "OnlineLabelSmoothing")], ids=["alone", "beside others"])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_an_average_that_the_network_holds_is_that_of_one_that_stands_outside(name, others):
    results = []
    for held in (True, False):
        model = Network()
        if held:
            for other in others:
                setattr(model, other.lower(), BESIDE[other](model))
        beside = BESIDE[name](model)
        if held:
            model.beside = beside
        # All parameters, the average's too, as a trainer gives them; those need no gradient.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
        beside.attach(optimizer)
        losses = train(model, beside, optimizer)
        names, state = Network().state_dict().keys(), average_of(beside).state_dict()
        assert state.keys() == names
        results.append((losses, [state[name] for name in names], [model.state_dict()[name] for name in names]))
    assert all(equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert name == "SwitchEMA" or not equal(results[0][1], results[0][2])


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_its_state_travels_with_the_network_and_with_the_optimizer(name):
    model = Network()
    model.beside = BESIDE[name](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model.beside.attach(optimizer)
    train(model, model.beside, optimizer)
    other = Network()
    other.beside = BESIDE[name](other)
    other.load_state_dict(model.state_dict())
    assert equal(list(other.state_dict().values()), list(model.state_dict().values()))


def test_a_given_average_may_be_held_too():
    model = Network()
    model.ema = flatmin.EMA(model, decay=0.7)
    model.mesa = flatmin.MESA(model, average=model.ema, start_epoch=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model.ema.attach(optimizer)
    losses = train(model, model.mesa, optimizer)
    outside = Network()
    ema = flatmin.EMA(outside, decay=0.7)
    mesa = flatmin.MESA(outside, average=ema, start_epoch=0)
    optimizer = torch.optim.SGD(outside.parameters(), lr=0.2)
    ema.attach(optimizer)
    assert equal(losses, train(outside, mesa, optimizer))


def test_a_torch_average_of_a_network_that_holds_mesa_and_saf_can_be_given():
    model = Network()
    model.mesa, model.saf = flatmin.MESA(model, decay=0.9), BESIDE["SAF"](model)
    average = AveragedModel(model)
    assert flatmin.MESA(model, average=average, start_epoch=0)(model(X), X) > 0  # batch norm: training and evaluation


def test_hooks_of_a_network_are_still_told_from_those_of_what_it_holds(recwarn):
    model = Network()
    model.mesa = BESIDE["MESA"](model)
    model.mesa.average.module.last.register_forward_hook(lambda *_: None)
    flatmin.EMA(model)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["SAF", "OnlineLabelSmoothing", "MESA"])
def test_a_network_whose_forward_calls_its_loss_has_an_average_that_runs(name):
    class Whole(Network):
        def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            logits = super().forward(x)
            return logits, self.beside(logits, beside)

    model = Whole()
    model.beside = BESIDE[name](model)
    logits, penalty = flatmin.EMA(model).module(X, X if name == "MESA" else Y)
    assert logits.shape == (N, C)
    assert penalty == 0
    assert penalty.dtype == torch.float32


@pytest.mark.parametrize("path", [None, "folder"])
@pytest.mark.parametrize("history", ["dense", "int6", "lowrank", "mean"])
def test_torchs_average_copies_no_rows_and_is_not_disturbed(history, path, tmp_path):
    codec = flatmin.history.LowRank(2) if history == "lowrank" else history
    arguments = {"history": codec, "lag": None if history == "mean" else 1, "start_epoch": 1}

    def make() -> Network:
        model = Network()
        model.saf = flatmin.SAF(N, C, **arguments, path=tmp_path if path else None)
        for epoch in range(2):
            model.saf.set_epoch(epoch)
            model.saf(model(X), torch.arange(N))
        model.saf.set_epoch(2)
        return model

    model = make()
    average = AveragedModel(model, use_buffers=True)
    store = average.module.saf.history.store
    assert store.rows.untyped_storage().nbytes() == store.epochs.untyped_storage().nbytes() == 0
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(average.module.last.weight, model.last.weight)
    assert average.module.eval().saf(model(X), torch.arange(N)) == 0
    with pytest.raises(InvalidArgumentError, match="was copied into an average of the network"):
        average.module.train().saf(model(X), torch.arange(N))
    # Lightning saves the average's state as the network's, and loads it into one of both.
    state = average.module.state_dict()
    again = AveragedModel(make(), use_buffers=True).module
    again.load_state_dict(state)
    again.load_state_dict(model.state_dict())
    with pytest.warns(flatmin.errors.FlatminWarning, match=f"an average, which has none: {N} of the {N} samples"):
        model.load_state_dict(state)
    assert (model.saf.history.store.epochs == -1).all()


def test_another_copy_has_the_rows():
    model = Network()
    model.saf = BESIDE["SAF"](model)
    model.saf(model(X), torch.arange(N))
    twin = copy.deepcopy(model)
    assert torch.equal(twin.saf.history.store.rows, model.saf.history.store.rows)
    assert twin.saf.history.store.rows.any()
    assert twin.saf.history.store.rows.data_ptr() != model.saf.history.store.rows.data_ptr()


@pytest.mark.parametrize("name", ["SAF", "OnlineLabelSmoothing"])
def test_what_is_collected_is_no_buffer_of_the_network_and_moves_and_is_saved_with_it(name):
    model = Network()
    model.beside = BESIDE[name](model)
    model.beside(model(X), torch.arange(N) if name == "SAF" else Y)
    collected = (lambda m: m.beside.history.store.rows) if name == "SAF" else (lambda m: m.beside.sums)
    assert collected(model).any()
    assert not any(buffer.data_ptr() == collected(model).data_ptr() for buffer in model.buffers())
    other = Network()
    other.beside = BESIDE[name](other)
    key = "beside.history.store.rows" if name == "SAF" else "beside.sums"
    state = model.state_dict()
    assert torch.equal(state[key], collected(model))
    other.load_state_dict(state)
    assert torch.equal(collected(other), collected(model))
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"beside\.more"'):
        other.load_state_dict({**model.state_dict(), "beside.more": torch.ones(1)})
    assert collected(model.to("meta")).is_meta
