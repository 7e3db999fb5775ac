"""Two trainings in two threads of a process: each goes on as it would alone, wherever the other one is in its step."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.contracts._optimizers import EVERY, Training, assert_same, network, sgd


class Plain:
    """A training without flatmin, whose backward pass and whose step are apart.

    Args:
        scaled: Whether a scaler scales its loss.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.model = network().double()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        self.optimizer = sgd(self.model)
        self.x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(self.x).square().mean()).backward()

    def end(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class Sharp(Plain):
    """A training with one of flatmin's optimizers, whose whole step is made at once."""

    def __init__(self) -> None:
        self.training = Training("SAM")
        self.backward, self.end = self.training.step, lambda: None
        self.state = self.training.state


KINDS = {"plain": Plain, "scaled": lambda: Plain(scaled=True), "sharpness-aware": Sharp}
CASES = [(name, "plain", number) for name in EVERY for number in range(1, EVERY[name].max_passes + 1)]
CASES += [("SAM", kind, number) for kind in ("scaled", "sharpness-aware") for number in (1, 2)]


@pytest.mark.parametrize(("name", "kind", "number"), CASES)
def test_each_is_as_alone(name, kind, number):
    """The other one's backward pass is within a pass of ours, that of ``number``, and its step after ours."""
    ours, theirs, twin = Training(name), KINDS[kind](), KINDS[kind]()
    made: list[int] = []

    def backward() -> None:
        theirs.backward()
        made.append(number)

    def first() -> None:  # an optimizer is known by the thread in which it steps
        theirs.backward(), theirs.end()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(first).result()
        ours.each_pass = lambda: ours.passes == number and thread.submit(backward).result()
        for step in range(1, 3):
            ours.passes = 0
            ours.step()
            if len(made) == step:  # not in a step of LookSAM's without a second pass
                thread.submit(theirs.end).result()
    alone = Training(name)
    alone.step(2)
    assert_same(ours.state(), alone.state())
    for _ in range(1 + len(made)):
        twin.backward(), twin.end()
    assert made
    assert_same(theirs.state(), twin.state())


class InThreads(nn.DataParallel):
    """As on several GPUs, where it calls its replicas in threads of its own; there is one, which is the network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.module, x).result()


@pytest.mark.parametrize("name", EVERY)
def test_threads_of_data_parallel_belong_to_the_training(name):
    plain, parallel = Training(name), Training(name)
    parallel.forward = InThreads(parallel.model)
    plain.step(4), parallel.step(4)
    assert_same(parallel.state(), plain.state())


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].max_passes == 2])
def test_a_training_may_go_on_in_another_thread(name):
    """With what another optimizer trains beside, such as each epoch in a thread of its own."""

    def made() -> tuple[Training, torch.optim.Optimizer]:
        ours, beside = Training(name), nn.Parameter(torch.ones(3).double())
        forward = ours.forward
        ours.forward = lambda x: forward(x) * beside.sum()
        return ours, torch.optim.SGD([beside], lr=0.1, momentum=0.9)

    def steps(ours: Training, other: torch.optim.Optimizer) -> None:
        for _ in range(2):
            other.zero_grad()
            ours.step()
            other.step()

    here, there = made(), made()
    steps(*here), steps(*here)
    with ThreadPoolExecutor(1) as thread:
        steps(*there), thread.submit(steps, *there).result()
    assert_same(there[0].state(), here[0].state())
    assert_same(there[1].state_dict(), here[1].state_dict())
    assert_same(there[1].param_groups[0]["params"][0], here[1].param_groups[0]["params"][0])
