"""The line that is made of whatever leaves a user's code, and data sets that are read through it."""

import copy
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from flatmin.errors import DataError, ExperimentError, InvalidArgumentError
from flatmin.lab.problems.load import load_problem
from flatmin.lab.problems.source import NETWORK, STEP, TRAIN, SampleLists, Samples, Source, aside
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.training.trainer import Trainer

FILE = Source(Path("an_experiment.py"))


class Counted(Dataset):
    """Counts its reads and draws from a generator of its own."""

    def __init__(self):
        self.reads = 0
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.reads += 1
        return torch.rand(1, generator=self.generator), index


@pytest.mark.parametrize("error", [ValueError("a\nb"), KeyError("x"), SystemExit(0), SystemExit(), MemoryError()])
def test_whatever_is_raised_is_one_line_of_the_file(error):
    with (
        pytest.raises(ExperimentError, match=r"an_experiment.py: .*\(in a training step\)") as caught,
        FILE.calling(STEP),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), DataError("as it is")])
def test_interrupts_and_own_errors_pass(error):
    with pytest.raises(type(error)) as caught, FILE.calling(STEP):
        raise error
    assert caught.value is error


def test_without_a_file_only_the_network_is_the_users_mistake():
    named = Source(name="model 'cnn' on inputs of shape (1, 1, 1) ('idx:x')")
    said = r"model 'cnn' on inputs .* cannot be used: RuntimeError: small"
    with pytest.raises(InvalidArgumentError, match=said), named.calling(NETWORK):
        raise RuntimeError("small")
    with pytest.raises(RuntimeError, match="a fault of flatmin's"), named.calling(STEP):
        raise RuntimeError("a fault of flatmin's")
    with pytest.raises(InvalidArgumentError, match="too little memory; lower batch_size"), named.calling(STEP):
        raise RuntimeError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("kind", [Samples, SampleLists])
def test_a_data_set_reads_as_it_did_pickled_copied_or_in_parts(kind):
    class Both(Counted):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    read = kind(Both(), FILE, TRAIN, 5)
    assert read.reads == 0
    assert len(copy.copy(read)) == len(Subset(read, [0, 1])) + 3
    assert [int(y) for _, batch in DataLoader(read, batch_size=2) for y in batch] == [0, 1, 2, 3, 4]
    assert read.reads == 5
    assert not hasattr(Samples(Counted(), FILE, TRAIN, 5), "__getitems__")


def test_it_can_be_pickled():
    read = pickle.loads(pickle.dumps(Samples([1, 2], FILE, TRAIN, 2)))
    assert [read[0], len(read)] == [1, 2]
    with pytest.raises(ExperimentError, match="IndexError"):
        read[7]


def test_a_look_aside_moves_neither_counter_nor_generator():
    for wrap in (lambda each: each, lambda each: Subset(each, [1, 2, 3])):
        dataset = Counted()
        before = dataset.generator.get_state()
        aside(wrap(dataset))[1]
        assert dataset.reads == 0
        assert torch.equal(dataset.generator.get_state(), before)


@pytest.mark.parametrize("shape", [(40, 1, 1), (40, 1, 500)])
def test_images_that_the_network_cannot_pool_are_a_line(shape, tmp_path):
    for part, count in (("train", shape[0]), ("t10k", shape[0])):
        header = struct.pack(">4B3I", 0, 0, 8, 3, *shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(20)) * (2 * shape[1] * shape[2]))
        labels = bytes(number % 2 for number in range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)
    run = Run(Recipe(data=f"idx:{tmp_path}", epochs=1, device="cpu"), "base", {"smoothing": 0.0})
    trainer = Trainer(run, load_problem(run.recipe, 0))
    with pytest.raises(InvalidArgumentError, match=r"model 'cnn' on inputs of shape .* cannot be used: RuntimeError"):
        trainer.train_epoch()
