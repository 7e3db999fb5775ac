"""What SAF says of epochs that cannot be meant: labels for indices, and too few samples compared."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch.utils.data import RandomSampler, WeightedRandomSampler

import flatmin
from flatmin.errors import FlatminWarning

N, C, B = 400, 10, 40


def train(indices, epochs=range(8), **options) -> tuple[flatmin.SAF, list[str]]:
    """Trains on the indices that ``indices(epoch)`` gives; returns what was warned."""
    saf = flatmin.SAF(N, C, **{"lag": 3, "start_epoch": 0, **options})
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, C, generator=generator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in epochs:
            saf.set_epoch(epoch)
            for index in torch.as_tensor(indices(epoch)).split(B):
                noise = torch.randn(len(index), C, generator=generator)
                saf((outputs[index] + noise).requires_grad_(), index)
    assert {warning.category for warning in caught} <= {FlatminWarning}
    assert {warning.filename for warning in caught} <= {__file__}
    return saf, [str(warning.message) for warning in caught]


def seeded(epoch):
    return torch.Generator().manual_seed(epoch)


def shuffled(epoch):
    return torch.randperm(N, generator=seeded(epoch))


FAULTS = {
    "labels": (lambda epoch: shuffled(epoch) % C, "saw 400 samples in epoch 0 and only 10 .*class numbers.*its label"),
    "two classes": (lambda epoch: shuffled(epoch) % 2, "only 2 different .*class numbers"),
    "places in the batch": (lambda epoch: torch.arange(N) % B, "only 40 different indices, so .*place in the batch"),
    "with replacement": (
        lambda epoch: list(RandomSampler(range(N), replacement=True, generator=seeded(epoch))),
        r"compared [34]\d% .* epoch 3: .*not recorded in epoch 0",
    ),
    "weighted": (
        lambda epoch: list(WeightedRandomSampler(torch.arange(N) % 4 == 0, N, generator=seeded(epoch))),
        r"compared 2\d% .* epoch 3",
    ),
    "a quarter of the batches": (lambda epoch: shuffled(epoch)[: N // 4], r"compared [12]\d% .*no limit"),
    "another half each time": (lambda epoch: shuffled(0)[epoch % 2 * N // 2 :][: N // 2], "compared 0% .* epoch 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_meant_is_warned_of_once(fault):
    indices, message = FAULTS[fault]
    _, said = train(indices)
    assert len(said) == 1
    assert re.search(message, said[0])


RIGHT = {
    "shuffled": shuffled,
    "in order": lambda epoch: torch.arange(N),
    "the same quarter": lambda epoch: torch.arange(N // 4),
    "nearly all": lambda epoch: shuffled(epoch)[: N * 4 // 5],
    "padded for several ranks": lambda epoch: torch.cat([shuffled(epoch), torch.arange(3)]),
    "few samples": lambda epoch: shuffled(epoch)[:50],
    "nothing": lambda epoch: torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("options", [{}, {"lag": 1}, {"history": "mean", "lag": None}, {"start_epoch": 5}])
def test_nothing_is_said_of_an_epoch_that_is_right(right, options):
    assert train(RIGHT[right], **options)[1] == []


def test_three_views_of_each_sample_are_no_labels():
    said = train(lambda epoch: shuffled(epoch).repeat_interleave(3)[:N])[1]
    assert not any("label" in each for each in said)


def test_the_first_epoch_of_a_low_rank_history_is_not_held_against_it():
    assert train(shuffled, history=flatmin.history.LowRank(rank=4))[1] == []


def test_a_resume_without_the_state_is_told_of():
    _, said = train(shuffled, range(7, 10))
    assert len(said) == 1
    assert re.search(r"first samples in epoch 7, and compares nothing for 3 epochs: .* load SAF's state too", said[0])


def test_evaluation_counts_for_nothing():
    saf = flatmin.SAF(N, C, lag=1, start_epoch=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(4):
            saf.train().set_epoch(epoch)
            saf(torch.eye(N, C, requires_grad=True)[shuffled(epoch)], shuffled(epoch))
            saf.eval()(torch.randn(N, C), shuffled(epoch) % C)
    assert caught == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda saf: pickle.loads(pickle.dumps(saf))])
def test_a_copy_begins_anew_and_watches_too(clone):
    saf, _ = train(shuffled, range(2))
    cloned = clone(saf)
    cloned.set_epoch(2)
    cloned(torch.randn(N, C, requires_grad=True), torch.arange(N) % C)
    cloned.set_epoch(3)
    with pytest.warns(FlatminWarning, match="class numbers"):
        cloned(torch.randn(N, C, requires_grad=True), shuffled(3))
