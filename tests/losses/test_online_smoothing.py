"""Online label smoothing against a transcription of the paper, and what it must not do."""

import math

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError
from tests.live import live
from tests.reference import oracles

C = 4


def stream(epochs=4, batches=3):
    generator = torch.Generator().manual_seed(0)
    return [
        [
            (
                3 * torch.randn(6, C, generator=generator, dtype=torch.float64),
                torch.randint(C, (6,), generator=generator),
            )
            for _ in range(batches)
        ]
        for _ in range(epochs)
    ]


@pytest.mark.parametrize("coefficient", [0.5, 0.2])
def test_the_sum_with_the_cross_entropy_is_the_papers_loss(coefficient):
    smoothing = flatmin.OnlineLabelSmoothing(C, coefficient=coefficient).double()
    labels = [[1 / C] * C for _ in range(C)]
    for epoch, batches in enumerate(stream()):
        smoothing.set_epoch(epoch)
        for logits, y in batches:
            loss = F.cross_entropy(logits, y) + smoothing(live(logits), y)
            expected = oracles.online_smoothing_loss(logits.tolist(), y.tolist(), labels, coefficient)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
        labels = oracles.online_soft_labels([(z.tolist(), y.tolist()) for z, y in batches], labels)
    smoothing.set_epoch(len(stream()))
    torch.testing.assert_close(smoothing.soft_labels, torch.tensor(labels, dtype=torch.float64))


def test_the_first_epoch_is_plain_label_smoothing():
    smoothing = flatmin.OnlineLabelSmoothing(C, coefficient=0.3).double()
    logits, y = stream()[0][0]
    logits.requires_grad_()
    loss = F.cross_entropy(logits, y) + smoothing(live(logits), y)
    expected = F.cross_entropy(logits, y, label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


def test_it_learns_which_classes_are_alike():
    """The mechanism: classes 0 and 1 are confused, and so their soft labels share; 2 is apart."""
    smoothing = flatmin.OnlineLabelSmoothing(3)
    logits = torch.tensor([[2.0, 1.5, -3.0], [1.5, 2.0, -3.0], [-3.0, -3.0, 3.0]])
    smoothing(live(logits), torch.arange(3))
    smoothing.set_epoch(1)
    soft = smoothing.soft_labels
    assert soft[0, 1] > 0.3
    assert soft[0, 2] < 0.01
    assert soft[2, 2] > 0.99


def test_a_class_never_right_keeps_its_labels_and_overflows_are_not_counted():
    smoothing = flatmin.OnlineLabelSmoothing(2)
    smoothing(live(torch.tensor([[2.0, 0.0], [2.0, 0.0], [math.inf, 0.0]])), torch.tensor([0, 1, 0]))
    smoothing.set_epoch(1)
    torch.testing.assert_close(smoothing.soft_labels[1], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(smoothing.soft_labels[0], torch.tensor([2.0, 0.0]).softmax(0))


def test_in_evaluation_it_adds_and_counts_nothing():
    smoothing = flatmin.OnlineLabelSmoothing(C).eval()
    logits, y = stream()[0][0]
    assert smoothing(live(logits), y).item() == 0
    assert not smoothing.sums.any()


def test_no_gradient_flows_into_the_soft_labels_and_half_precision_is_summed_in_float32():
    smoothing = flatmin.OnlineLabelSmoothing(C)
    logits, y = stream()[0][0]
    logits = logits.bfloat16().requires_grad_()
    loss = smoothing(live(logits), y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert not smoothing.soft_labels.requires_grad
    assert not smoothing.sums.requires_grad
    assert smoothing.sums.dtype == torch.float32


def test_resume_within_an_epoch_goes_on_counting():
    whole, first, second = (flatmin.OnlineLabelSmoothing(C) for _ in range(3))
    for smoothing in (whole, first):
        smoothing.set_epoch(1)
        smoothing(live(torch.eye(C)), torch.arange(C))
    second.load_state_dict(first.state_dict())
    for smoothing in (whole, second):
        smoothing.set_epoch(1)  # as a resumed loop says again
        smoothing(live(3 * torch.eye(C)), torch.arange(C))
        smoothing.set_epoch(2)
    expected = (torch.eye(C).softmax(dim=1) + (3 * torch.eye(C)).softmax(dim=1)) / 2
    for smoothing in (whole, second):
        torch.testing.assert_close(smoothing.soft_labels, expected)


def test_all_ranks_are_counted(monkeypatch):
    smoothing = flatmin.OnlineLabelSmoothing(2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(torch.tensor([[0.0, 0.0], [1.0, 3.0]])))
    smoothing.set_epoch(1)
    torch.testing.assert_close(smoothing.soft_labels, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))


@pytest.mark.parametrize("wrong", [-100, 4])
def test_a_class_that_is_none_is_refused_before_any_is_counted(wrong):
    smoothing = flatmin.OnlineLabelSmoothing(C)
    y = torch.tensor([0, 1, 2, wrong])
    with pytest.raises(
        InvalidArgumentError, match=rf"^y must lie in \[0, 4\), got values from .*{wrong}.*ignore_index"
    ):
        smoothing(live(10 * torch.eye(C)), y)
    assert not smoothing.sums.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flatmin.OnlineLabelSmoothing(1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: flatmin.OnlineLabelSmoothing(3, coefficient=1.5), "coefficient must be .* <= 1, got 1.5"),
        (
            lambda: flatmin.OnlineLabelSmoothing(3)(live(torch.zeros(2, 4)), torch.zeros(2).long()),
            "was made for num_classes=3",
        ),
        (
            lambda: flatmin.OnlineLabelSmoothing(3)(live(torch.zeros(2, 3)), torch.zeros(2, 3)),
            "y must be class indices",
        ),
        (lambda: flatmin.OnlineLabelSmoothing(3).set_epoch(-1), "epoch must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
