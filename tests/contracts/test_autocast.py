"""Contexts around the step that keep what is made of the weights: no pass may read what is of weights that have moved.

An autocast keeps casts of them, and ``parametrize.cached()`` what parametrizations make.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tests.contracts._optimizers import CLOSURES, EVERY, Training, assert_same, network
from tests.contracts.test_passes import two_steps


def on() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def off() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=False)


@contextlib.contextmanager
def nested():
    with on(), off(), on():
        yield


def trained(name: str, way: Callable, outer: Callable, *, whole: bool, look: bool) -> tuple[Training, list[float]]:
    """Four steps, in one context each or ``whole`` in one; with a forward pass before each, such as one to log."""
    training, seen = Training(name, dtype=torch.float32, autocast=torch.bfloat16), []
    training.model.register_forward_hook(
        lambda module, inputs, output: seen.append(float(output.detach().float().norm()))
    )
    with outer() if whole else contextlib.nullcontext():
        for _ in range(4):
            with contextlib.nullcontext() if whole else outer():
                if look:
                    training._loss(training.x, training.y, "mean")
                way(training, 1)
    return training, seen


class Mirrored(nn.Module):
    """Keeps no tensor for its backward pass, which can thus be run again."""

    def forward(self, weight):
        return weight + weight.flip(0)


def mirrored() -> nn.Module:
    model = network()
    parametrize.register_parametrization(model[0], "weight", Mirrored())
    return model


def normed() -> nn.Module:
    model = network()
    weight_norm(model[0])
    return model


WAYS = [(name, way) for name in EVERY for way in (Training.step, Training.loop, two_steps)]


@pytest.mark.parametrize(("name", "way"), [pair for pair in WAYS if pair[0] in CLOSURES or pair[1] is Training.step])
@pytest.mark.parametrize("outer", [on, off, nested])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("look", [False, True])
def test_every_pass_casts_the_weights_as_they_are(name, way, outer, whole, look):
    ours, seen = trained(name, way, outer, whole=whole, look=look)
    theirs, expected = trained(name, way, contextlib.nullcontext, whole=False, look=look)
    assert seen == expected
    assert_same(ours.state(), theirs.state())


@pytest.mark.parametrize(("name", "way"), [pair for pair in WAYS if pair[0] in CLOSURES or pair[1] is Training.step])
def test_every_pass_makes_parametrized_weights_anew(name, way):
    for make in (mirrored, normed):
        ours, theirs = Training(name, make()), Training(name, make())
        with parametrize.cached():
            way(ours, 2)
        with parametrize.cached():
            way(ours, 1)
        way(theirs, 3)
        assert_same(ours.state(), theirs.state())
