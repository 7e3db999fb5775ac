"""What tests of one-pass methods in loops without a closure share."""

from collections.abc import Callable

import torch

from tests.contracts._optimizers import EVERY, Training

ONE_PASS = [name for name in EVERY if EVERY[name].max_passes == 1]


def made(name: str, **arguments: object) -> Training:
    return Training(name, given=True, **arguments)


def losses(training: Training, parts: int) -> list[Callable[[], torch.Tensor]]:
    """A forward pass for each micro-batch."""
    batches = zip(training.x.chunk(parts), training.y.chunk(parts), strict=True)
    return [lambda x=x, y=y: training._loss(x, y, "mean") / parts for x, y in batches]


def weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def differ_now(training: Training, clean: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(training.model.parameters(), clean, strict=True))


def plain(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        loss().backward()
    training.optimizer.step()


def outside_scaler(training: Training, parts: int) -> None:
    scaler = training.outside
    training.optimizer.zero_grad()
    for loss in losses(training, parts):
        scaler.scale(loss()).backward()
    scaler.unscale_(training.optimizer)
    scaler.step(training.optimizer)
    scaler.update()


def buffers(state: dict) -> dict:
    return {key: value for key, value in state["model"].items() if "running" in key or "num_batches" in key}
