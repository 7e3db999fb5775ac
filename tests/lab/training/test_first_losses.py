"""A run whose loss is never finite is ended; one that had a single finite loss is not."""

import math

import pytest
import torch

from flatmin.errors import DivergedError
from flatmin.lab.training.first_losses import JUDGED, FirstLosses
from flatmin.lab.training.progress import Progress


def judged(losses, *, epoch=0, done=0):
    """After how many steps the losses of an epoch end the run, with two of its metrics; None if they do not."""
    first = FirstLosses(torch.device("cpu"))
    first.begin_epoch(epoch, done)
    for step, loss in enumerate([*losses, None], start=1):
        if loss is None or first.add(torch.tensor(loss)):
            try:
                first.judge(Progress(steps=min(step, len(losses)), calls=2 * min(step, len(losses))), 0.1, "float32", 7)
            except DivergedError as error:
                return min(step, len(losses)), error.metrics["closure_calls"], error.metrics["extra_bytes"]
    return None


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_no_finite_loss_in_the_first_steps_or_in_a_shorter_epoch(lost):
    assert judged([lost] * 200) == (JUDGED, 2, 7)
    assert judged([lost] * 3)[0] == 3
    assert judged([lost])[0] == 1


@pytest.mark.parametrize("losses", [[math.nan, 1.0, math.nan], [1.0] + [math.nan] * 99, [math.nan] * 49 + [1.0]])
def test_one_finite_loss_is_enough(losses):
    assert judged(losses) is None


def test_what_comes_later_is_not_judged():
    assert judged([math.nan] * 99, epoch=1) is None
    assert judged([math.nan] * 99, done=1) is None


def test_a_trainer_ends_in_its_first_epoch_and_only_there(make_trainer):
    trainer = make_trainer("base")
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match=r"not finite in any of the first 3 steps.*it is 0.1.*it is float32"):
        trainer.train_epoch()
    trainer = make_trainer("base")
    trainer.train_epoch()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    assert math.isnan(trainer.train_epoch()["test_loss"])
