"""Time per step of several methods, as ratios, their steps interleaved in one process."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..methods import get_method
from ..results import Row
from ..training.trainer import Trainer

NEVER = 10**9  # of so many steps only the first has a second pass, in the warm-up


@dataclass(frozen=True)
class StepTimes:
    """Times of one method's steps in seconds, one for each round; all methods take part in each round."""

    seconds: list[float]

    def median(self) -> float:
        """The median time, in seconds."""
        return statistics.median(self.seconds)

    def ratio(self, base: "StepTimes") -> float:
        """Median over the rounds of this method's time divided by the base's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds, strict=True))


@dataclass(frozen=True)
class Cost:
    """Step times of a row: with the second pass and, where only some steps have one, without (``plain``)."""

    full: StepTimes
    plain: StepTimes | None = None


def measure_rows(
    rows: Sequence[Row],
    build: Callable[[Row], Trainer],
    batch: tuple[Tensor, Tensor, Tensor],
    **options: Any,
) -> tuple[list[Cost], list[Trainer]]:
    """Measures the steps of all rows side by side; where only some steps have a second pass, both kinds.

    Args:
        rows: The rows.
        build: Makes the trainer of a row.
        batch: As for `measure_steps`.
        **options: As for `measure_steps`.

    Returns:
        The cost of each row, and a trainer of each.
    """
    kinds = [_kinds(row) for row in rows]
    trainers = [
        build(replace(row, settings=settings)) for row, some in zip(rows, kinds, strict=True) for settings in some
    ]
    times = iter(measure_steps(trainers, batch, **options))
    costs = [Cost(*(next(times) for _ in some)) for some in kinds]
    places = itertools.accumulate((len(some) for some in kinds[:-1]), initial=0)
    return costs, [trainers[place] for place in places]


def _kinds(row: Row) -> list[Mapping[str, Any]]:
    """Settings whose steps all cost the same: those of the row, or with a second pass in each and in none."""
    method = get_method(row.method)
    if method.closure_calls == 1 or row.settings.get("when", "always") == "always":
        return [row.settings]
    method.second_pass(0, row.settings, 1)  # says what is wrong with it
    return [{**row.settings, "when": "always"}, {**row.settings, "when": f"every:{NEVER}"}]


def measure_steps(
    trainers: Sequence[Trainer],
    batch: tuple[Tensor, Tensor, Tensor],
    *,
    seconds: float,
    least_rounds: int = 10,
    warm_up: int = 2,
    block: int = 1,
    on_round: Callable[[int], None] | None = None,
) -> list[StepTimes]:
    """Measures the training step of several methods side by side.

    In each round every trainer makes a step, in a random order, so that a machine that slows down slows all of them.
    Trajectory losses act in every step: each round is an epoch in which the batch was recorded ``lag`` epochs ago. The
    whole step is timed: clearing gradients, forward, penalty, backward, update. Where the loss is computed only in
    every k-th step, a round is the mean of k steps.

    Args:
        trainers: One for each method; measuring trains them.
        batch: ``(index, x, y)`` as for `Trainer.step`.
        seconds: How long to measure, about.
        least_rounds: Fewest rounds, however long they take.
        warm_up: Rounds before the measurement.
        block: Steps of a trainer in a round, with one wait for the device after the last. On an accelerator several: to
            wait after each step hides what it costs to wait within it.
        on_round: Called with the number of each round that is done.

    Returns:
        One `StepTimes` for each trainer, with equally many rounds.
    """
    times: list[list[float]] = [[] for _ in trainers]
    starts = [_first_active_epoch(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.make_statistics()  # in training a target has them before it acts
    order = random.Random(0)
    end, done = time.perf_counter() + seconds, -warm_up
    while done < least_rounds or time.perf_counter() < end:
        for place in order.sample(range(len(trainers)), len(trainers)):
            trainer = trainers[place]
            start, lag = starts[place]
            trainer.model.train()
            steps = block * getattr(trainer.trajectory, "interval", 1)
            # The first step of the warm-up is before the loss begins: it only records.
            epochs = [start + ((done + warm_up) * block + step - 1) * lag for step in range(block)]
            elapsed = _timed(trainer, batch, [epoch for epoch in epochs for _ in range(steps // block)]) / steps
            if done >= 0:
                times[place].append(elapsed)
        done += 1
        if done == 0:
            end = time.perf_counter() + seconds
        if on_round is not None:
            on_round(done)
    return [StepTimes(each) for each in times]


def _first_active_epoch(trainer: Trainer) -> tuple[int, int]:
    """The first epoch in which the trajectory loss acts, and its lag in epochs."""
    trajectory = trainer.trajectory
    lag = getattr(trajectory, "lag", 1)
    return max(getattr(trajectory, "start_epoch", 0), lag), lag


def _timed(trainer: Trainer, batch: tuple[Tensor, Tensor, Tensor], epochs: Sequence[int]) -> float:
    """The time of a step in each of some epochs, all together."""
    trainer.set_epoch(epochs[0])
    synchronize(trainer.device)
    start = time.perf_counter()
    for before, epoch in zip((epochs[0], *epochs), epochs, strict=False):
        if epoch != before:
            trainer.set_epoch(epoch)
        trainer.step(*batch)
    synchronize(trainer.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator; nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
