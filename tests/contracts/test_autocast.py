"""An autocast around the step, which keeps casts of the weights: no pass may read those of weights that have moved."""

import contextlib
from collections.abc import Callable

import pytest
import torch

from tests.contracts._optimizers import CLOSURES, EVERY, Training, assert_same
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
