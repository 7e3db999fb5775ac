"""A closure that adds to gradients that were there before it is found, and no right loop is taken for one."""

import copy

import pytest
import torch

from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from tests.contracts._optimizers import CLOSED, QUANTIZED, TRAINED, Training, assert_same

TWO = [name for name in CLOSED if TRAINED[name].max_passes == 2]
two = pytest.mark.parametrize("name", TWO)
MESSAGE = r"adds to gradients that were there.*begin with optimizer\.zero_grad\(\) and go over all micro-batches"


class Adding(Training):
    """Whose closure clears nothing, or in its own way."""

    clear = staticmethod(lambda: None)

    def closure(self):
        self.passes += 1
        self.each_pass()
        self.clear()
        loss = self._loss(self.x, self.y, "mean") * self.factor.get(self.passes, 1.0)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()


def by_closure(training: Training, count: int = 1) -> None:
    training.step(count)


def by_passes(training: Training, count: int = 1) -> None:
    training.loop(count)


ways = pytest.mark.parametrize("way", [by_closure, by_passes])


@pytest.mark.parametrize("name", [name for name in TWO if name not in QUANTIZED])  # which leave some without a gradient
@ways
def test_gradients_of_the_step_before(name, way):
    training = Adding(name)
    way(training)
    before = [p.detach().clone() for p in training.model.parameters()]
    gradients = [p.grad.clone() for p in training.model.parameters()]
    with pytest.raises(InvalidArgumentError, match=MESSAGE):
        way(training)
    assert_same([p.detach() for p in training.model.parameters()], before)
    assert all(p.grad.isfinite().all() for p in training.model.parameters())
    assert not all(torch.equal(p.grad, g) for p, g in zip(training.model.parameters(), gradients, strict=True))
    training.optimizer.zero_grad()
    way(training)


@two
@ways
@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_another_micro_batch(name, way, first):
    """As Lightning accumulates: the closure of one micro-batch clears and is no step, that of the next is."""
    training = Adding(name)
    if not first:
        way(training)
        training.optimizer.zero_grad()
    training.closure()
    with pytest.raises(InvalidArgumentError, match=MESSAGE):
        way(training)


CLEAR = {
    "none": lambda t: t.optimizer.zero_grad(),
    "in place": lambda t: t.optimizer.zero_grad(set_to_none=False),
    "model": lambda t: t.model.zero_grad(),
    "by hand": lambda t: [setattr(p, "grad", None) for p in t.model.parameters()],
    "zeros": lambda t: [p.grad.zero_() for p in t.model.parameters() if p.grad is not None],
}


@two
@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("where", ["inside", "after the step", "before the step"])
def test_no_right_loop_is_taken_for_one(name, clear, where):
    way = by_passes if clear in ("in place", "model") else by_closure
    ours, theirs = Adding(name), Training(name)
    if where == "inside":
        ours.clear = lambda: CLEAR[clear](ours)
    for _ in range(4):
        if where == "before the step":
            CLEAR[clear](ours)
        way(ours)
        if where == "after the step":
            CLEAR[clear](ours)
        theirs.step()
    assert_same(ours.state(), theirs.state())


@two
@pytest.mark.parametrize("clear", ["none", "in place"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "overflow", "not finite"])
def test_nor_one_in_low_precision_or_whose_gradient_is_not_finite(name, clear, kind):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if kind in ("float16", "overflow") else None
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind)
    options = {"dtype": torch.float32, "autocast": dtype} if dtype else {}
    training = Adding(name, scaler=scaler, **options)
    training.clear = lambda: CLEAR[clear](training)
    training.step(3)
    if kind in ("overflow", "not finite"):
        training.factor[training.passes + 1] = float("nan")
        if kind == "overflow":
            training.step()
        else:
            with pytest.warns(NonFiniteGradientWarning):
                training.step()
        assert training.optimizer.skipped_steps == 1
    training.step(2)


@two
def test_a_gradient_that_somebody_holds_is_as_it_was(name):
    """Also where the pass fails before it clears it."""
    training = Adding(name)
    training.clear = training.optimizer.zero_grad
    training.step()
    held = [p.grad for p in training.model.parameters()]
    before = copy.deepcopy(held)
    training.step()
    assert_same(held, before)
    held = [p.grad for p in training.model.parameters()]
    before = copy.deepcopy(held)

    def fails():
        raise RuntimeError("in the pass")

    training.each_pass = fails
    with pytest.raises(RuntimeError, match="in the pass"):
        training.step()
    assert_same([p.grad for p in training.model.parameters()], before)


def test_esam_clears_by_itself():
    training = Training("ESAM")
    training.step(2)
    training.model(training.x).sum().backward()
    training.step()
