"""Whether SAF notices that an index does not name the same sample in each epoch."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.history import LowRank, TopK
from flatmin.history._choose import CODECS
from flatmin.losses._kinship import Kinship

C = 10


def looked_at(outputs, *, samples=1000, epochs=12, batch=50, classes=C, views=1) -> tuple[Kinship, list[int]]:
    """Looks at epochs of ``outputs(epoch, index)``; returns in which ones it found samples not to be related."""
    kinship = Kinship(samples, classes)
    found = []
    for epoch in range(epochs):
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).repeat_interleave(views)
        for index in order.split(batch):
            if not kinship.settled and kinship(epoch, index, outputs(epoch, index)):
                found.append(epoch)
    return kinship, found


@functools.lru_cache(maxsize=2)
def noise(epoch, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + epoch))


def related(share, *, samples=1000, classes=C, scale=3.0):
    """Outputs that are the sample's own by ``share``."""
    own = torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))
    return lambda epoch, index: scale * (share * own[index] + (1 - share) * noise(epoch, samples, classes)[index])


RIGHT = {
    "mostly its own": {"outputs": related(0.8)},
    "a third its own": {"outputs": related(0.33)},
    "two classes": {"outputs": related(0.5, classes=2), "classes": 2},
    "many samples": {"outputs": related(0.5, samples=10_000), "samples": 10_000},
    "many classes": {"outputs": related(0.5, samples=200, classes=16_384), "samples": 200, "classes": 16_384},
    "few samples": {"outputs": related(0.5, samples=30), "samples": 30, "epochs": 30},
    "uneven batches": {"outputs": related(0.5), "batch": 37},
    "three views of each": {"outputs": related(0.5), "views": 3},
}


@pytest.mark.parametrize("case", RIGHT)
def test_outputs_that_are_a_samples_own_settle_it_without_a_word(case):
    kinship, found = looked_at(**RIGHT[case])
    assert found == []
    assert kinship.settled
    assert kinship._kept is None


WRONG = {name: {**case, "outputs": None} for name, case in RIGHT.items() if name not in ("a third its own",)}


@pytest.mark.parametrize("case", WRONG)
def test_outputs_of_other_samples_are_found_once(case):
    settings = WRONG[case]
    samples, classes = settings.get("samples", 1000), settings.get("classes", C)
    epochs = max(settings.get("epochs", 12), 30 if samples < 100 else 12)
    strangers = related(0.0, samples=samples, classes=classes)
    kinship, found = looked_at(**{**settings, "outputs": strangers, "epochs": epochs})
    assert len(found) == 1
    assert kinship.settled


def drifting(epoch, index):
    """The same for all samples, another in each epoch, but for a little that is the sample's."""
    return 3 * noise(epoch, C).expand(len(index), C) + 1e-3 * noise(epoch, 1000, C)[index]


UNTOLD = {
    "alike for all samples": lambda epoch, index: torch.ones(len(index), C),
    "hardly different": lambda epoch, index: torch.arange(C) + 1e-3 * noise(epoch, 1000, C)[index],
    "moved by more than they differ": drifting,
    "never finite": lambda epoch, index: torch.full((len(index), C), torch.nan),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_outputs_that_tell_no_samples_apart_are_not_held_against_the_index(case):
    kinship, found = looked_at(UNTOLD[case])
    assert found == []
    assert not kinship.settled


def test_classes_that_are_masked_out_and_rows_that_are_not_finite_do_not_count():
    own = related(0.5)

    def outputs(epoch, index):
        logits = own(epoch, index)
        logits[:, 0] = -torch.inf
        return logits.where((index % 7 != epoch % 7)[:, None], torch.nan)

    kinship, found = looked_at(outputs)
    assert kinship.settled
    assert found == []


def test_another_pass_of_the_same_epoch_and_a_training_from_the_start_say_nothing():
    kinship = Kinship(400, C)
    for epoch in (0, 0, 0, 3, 2, 1, 0):
        kinship(epoch, torch.arange(400), noise(epoch, 400, C))
    assert kinship._sums is not None
    assert kinship._total == [0.0] * 5
    assert not kinship.settled


class Resampled(Dataset):
    """Shuffles itself in each epoch, as a data set that is read anew from shards may."""

    def __init__(self, samples=400):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 6, generator=generator)
        self.y = (self.x @ torch.randn(6, C, generator=generator)).argmax(dim=1)
        self.order = torch.arange(samples)

    def shuffle(self, epoch):
        self.order = torch.randperm(len(self.order), generator=torch.Generator().manual_seed(epoch))

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.x[self.order[i]], self.y[self.order[i]]


def train(loader, dataset, history) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, C))
    codec = {"lowrank": LowRank(rank=4), "topk": TopK(k=4)}.get(history, history)
    saf = flatmin.SAF(len(dataset), C, start_epoch=2, history=codec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(8):
            saf.set_epoch(epoch)
            dataset.shuffle(epoch)
            for index, (x, y) in loader:
                optimizer.zero_grad()
                logits = model(x)
                (F.cross_entropy(logits, y) + saf(logits, index)).backward()
                optimizer.step()
    assert {warning.category for warning in caught} <= {FlatminWarning}
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("history", CODECS)
def test_a_data_set_that_shuffles_itself_is_told_of_once_and_not_if_it_is_indexed_before(history):
    dataset = Resampled()
    (said,) = train(flatmin.with_indices(DataLoader(dataset, 50, shuffle=True)), dataset, history)
    assert "no nearer to its earlier ones" in said
    assert "flatmin.indexed(dataset)" in said

    inner = Resampled()

    class Shuffled(Resampled):
        def __getitem__(self, i):
            return flatmin.indexed(inner)[int(self.order[i])]

    dataset = Shuffled()
    assert train(DataLoader(dataset, 50, shuffle=True), dataset, history) == []
