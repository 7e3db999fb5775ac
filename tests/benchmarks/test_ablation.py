"""The ablation's targets: that each is what it is said to be."""

import pytest
import torch
from torch import nn

import flatmin
from flatmin.lab.methods import Ingredients
from tests.live import live
from tests.registry import restored

N, C, EPOCHS = 12, 3, 8


@pytest.fixture
def ablation():
    with restored():
        from benchmarks import ablation

        yield ablation


def made(ablation, target):
    model = nn.Linear(2, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = Ingredients(model, optimizer, num_samples=N, num_classes=C, steps_per_epoch=3, epochs=EPOCHS)
    return ablation.Recall(target, given, coefficient=0.3)


def outputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EPOCHS, N, C, generator=generator), torch.arange(N) % C


def test_the_own_output_some_epochs_ago_is_saf(ablation):
    recall, saf = made(ablation, "lag3"), flatmin.SAF(N, C, lag=3)
    logits, y = outputs()
    for epoch in range(EPOCHS):
        recall.set_epoch(epoch), saf.set_epoch(epoch)
        for index in torch.randperm(N).split(4):
            ours, theirs = recall(logits[epoch, index], y[index], index), saf(live(logits[epoch, index]), index)
            torch.testing.assert_close(ours, theirs)
    assert ours > 0


@pytest.mark.parametrize(
    "target", ["lag1", "random-epoch", "mean", "same-class", "class-mean", "any-sample", "uniform"]
)
def test_each_target_is_what_it_is_said_to_be(ablation, target):
    recall = made(ablation, target)
    logits, y = outputs()
    index = torch.arange(N)
    for epoch in range(EPOCHS - 1):
        recall.set_epoch(epoch)
        recall(logits[epoch], y, index)
    recall.set_epoch(EPOCHS - 1)
    past = logits[EPOCHS - 1 - recall.lag]
    for sample, found in enumerate(recall.recalled(y, index)):
        alike = [other for other in range(N) if y[other] == y[sample] and other != sample]
        candidates = {
            "lag1": logits[EPOCHS - 2, sample][None],
            "random-epoch": logits[: EPOCHS - 1, sample],
            "same-class": past[alike],
            "class-mean": past[[*alike, sample]].mean(dim=0)[None],
            "any-sample": past,
            "uniform": torch.zeros(1, C),
        }
        if target == "mean":
            expected = logits[0, sample]
            for epoch in range(1, EPOCHS - 1):
                expected = 0.9 * expected + 0.1 * logits[epoch, sample]
            candidates["mean"] = expected[None]
        assert any(torch.allclose(found, candidate) for candidate in candidates[target])
