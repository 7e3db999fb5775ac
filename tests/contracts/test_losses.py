"""Losses that draw, or count, are the same function in both passes of a step, whatever optimizer makes it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.losses import _target
from tests.contracts._optimizers import CLOSURES, EVERY

TWO_PASSES = [name for name in CLOSURES if EVERY[name].max_passes == 2]
WAYS = ["step", "passes", "first_step"]


def make_steps(optimizer, closure, way, count=2):
    for _ in range(count):
        if way == "step":
            optimizer.step(closure)
        elif way == "passes":
            for _ in optimizer.passes():
                closure()
        else:
            closure()
            if optimizer.first_step():
                closure()
                optimizer.second_step()


def setting(name):
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    options = {"k": 1} if name == "LookSAM" else {}
    return model, EVERY[name](torch.optim.SGD(model.parameters(), lr=0.0), rho=3.0, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TWO_PASSES)
def test_mesa_draws_the_same_share_in_both_passes_and_another_in_the_next_step(name, way, monkeypatch):
    drawn, draw = [], _target.random_share
    monkeypatch.setattr(_target, "random_share", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    model, optimizer = setting(name)
    mesa = flatmin.MESA(model, start_epoch=0, fraction=0.25)
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    parts = 2

    def closure():
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            logits = model(inputs)
            (F.cross_entropy(logits, targets) + mesa(logits, inputs)).backward()
        return 0.0

    make_steps(optimizer, closure, way)
    shares = [tuple(each.tolist()) for each in drawn]
    passes = [shares[start : start + parts] for start in range(0, len(shares), parts)]
    assert len(passes) == 4
    assert passes[0] == passes[1]
    assert passes[2] == passes[3]
    assert len({*passes[0], *passes[2]}) == 2 * parts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TWO_PASSES)
def test_an_interval_of_mesa_counts_steps(name, way):
    model, optimizer = setting(name)
    mesa = flatmin.MESA(model, start_epoch=0, interval=2)
    nn.init.zeros_(mesa.average.module.weight)
    x, acted = torch.randn(8, 8), []

    def closure():
        optimizer.zero_grad()
        logits = model(x)
        penalty = mesa(logits, x)
        acted.append(bool(penalty > 0))
        (logits.log_softmax(1).square().mean() + penalty).backward()
        return penalty

    make_steps(optimizer, closure, way, count=3)
    assert acted == [True, True, False, False, True, True]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TWO_PASSES)
def test_soft_labels_count_each_sample_once_at_the_weights(name, way):
    model, optimizer = setting(name)
    smoothing = flatmin.OnlineLabelSmoothing(3)
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    with torch.no_grad():
        right = int((model(x).argmax(1) == y).sum())

    def closure():
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y) + smoothing(logits, y)
        loss.backward()
        return loss

    make_steps(optimizer, closure, way, count=1)
    assert int(smoothing.sums.sum().round()) == right > 0


def test_after_a_step_that_raised_nothing_counts_as_a_pass():
    _, optimizer = setting("SAM")

    def closure():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    for _ in optimizer.passes():
        break
    assert flatmin._passes.current_pass() is None
