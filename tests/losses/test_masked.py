"""Classes that a network masks out with -inf have no part in a loss."""

import pytest
import torch
from torch.nn import functional as F

import flatmin
from flatmin.losses import trajectory_loss
from tests.live import live

B, C = 8, 5


def logits(epoch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 3 * torch.randn(B, C, generator=torch.Generator().manual_seed(epoch)).to(dtype)


def masked(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(torch.arange(C) == C - 1, -torch.inf)


Y = torch.arange(B) % (C - 1)


@pytest.mark.parametrize("history", ["dense", "half", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_saf_is_as_without_the_class(history, dtype):
    losses, gradients = [], []
    for classes in (C, C - 1):
        lag = None if history == "mean" else 1
        saf = flatmin.SAF(B, classes, history=history, lag=lag, start_epoch=0)
        for epoch in range(3):
            saf.set_epoch(epoch)
            now = logits(epoch, dtype)
            now = (masked(now) if classes == C else now[:, :classes]).requires_grad_()
            loss = saf(live(now), torch.arange(B))
        loss.backward()
        losses.append(loss.item())
        gradients.append(now.grad[:, : C - 1])
        assert not now.grad[:, C - 1 :].any()
    assert losses[1] > 0.01
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("history", ["dense", "half", "int8", "int6", "int4", "mean"])
def test_every_form_takes_it_as_it_takes_minus_1e9(history):
    losses = []
    for value in (-torch.inf, -1e9):
        saf = flatmin.SAF(B, C, history=history, lag=None if history == "mean" else 1, start_epoch=0)
        for epoch in range(3):
            saf.set_epoch(epoch)
            loss = saf(live(masked(logits(epoch)).clamp(min=value)), torch.arange(B))
        losses.append(loss)
    assert losses[0] == losses[1] > 0


def test_saf_of_an_impossible_row_is_still_missing():
    saf = flatmin.SAF(2, C, lag=1, start_epoch=0)
    for epoch, value in enumerate((-torch.inf, 0.0)):
        saf.set_epoch(epoch)
        assert saf(live(torch.full((2, C), value)), torch.arange(2)) == 0


def test_online_label_smoothing_is_as_without_the_class():
    with_mask, without = flatmin.OnlineLabelSmoothing(C), flatmin.OnlineLabelSmoothing(C - 1)
    for epoch in range(3):
        losses, gradients = [], []
        for smoothing, classes in ((with_mask, C), (without, C - 1)):
            smoothing.set_epoch(epoch)
            now = logits(epoch)
            now = (masked(now) if classes == C else now[:, :classes]).requires_grad_()
            loss = F.cross_entropy(now, Y) + smoothing(live(now), Y)
            loss.backward()
            losses.append(loss.detach())
            gradients.append(now.grad[:, : C - 1])
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(with_mask.soft_labels[: C - 1, : C - 1], without.soft_labels)


def test_online_label_smoothing_takes_masks_that_differ_between_samples():
    smoothing = flatmin.OnlineLabelSmoothing(C)
    now = logits(0)
    now[::2] = masked(now)[::2]
    expected = []
    for row, y in zip(now, Y, strict=True):
        log = row[row.isfinite()].log_softmax(0)
        expected.append(0.5 * (log[y] - log.mean()))
    torch.testing.assert_close(smoothing(live(now), Y), torch.stack(expected).mean())


def test_mesas_loss_is_as_without_the_class():
    now, past = logits(0), logits(1)
    torch.testing.assert_close(
        trajectory_loss(masked(now), masked(past), temperature=5.0),
        trajectory_loss(now[:, : C - 1], past[:, : C - 1], temperature=5.0),
    )


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("history", ["dense", "half", "int8", "int6", "int4", "topk", "lowrank", "mean"])
def test_a_default_dtype_of_float64_changes_no_memory(history, doubles):
    lag = None if history == "mean" else 1
    losses = []
    for default in (torch.float64, torch.float32):
        torch.set_default_dtype(default)
        saf = flatmin.SAF(200, 120, history=history, lag=lag, start_epoch=0)
        assert not any(buffer.dtype == torch.float64 for buffer in saf.history.buffers())
        saf.to("cpu", torch.float32)
        for epoch in range(4):
            saf.set_epoch(epoch)
            own, other = (torch.Generator().manual_seed(seed) for seed in (9, epoch))
            logits = sum(torch.randn(200, 120, generator=each, dtype=torch.float32) for each in (own, other))
            loss = saf(live(logits), torch.arange(200))
        losses.append(loss)
    assert losses[0] == losses[1] > 0


def test_a_default_dtype_of_float64_changes_no_soft_label(doubles):
    assert flatmin.OnlineLabelSmoothing(3).soft_labels.dtype == torch.float32
