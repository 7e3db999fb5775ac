"""with_indices: the true indices of every kind of loader, which stays as it was."""

import gc
import multiprocessing
import os
import pickle
import time
import warnings

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

import flatmin
from flatmin.errors import InvalidArgumentError

N = 11


class Squares(Dataset):
    """Each item says which it is, and which process made it."""

    def __init__(self) -> None:
        self.items = [i * i for i in range(N)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.items[index], os.getpid()


class Late(Squares):
    """Its first sample waits for its third, where another process makes that."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.third = multiprocessing.get_context("fork").Event() if workers else None

    def __getitem__(self, index: int) -> tuple[int, int]:
        if self.third and index == 0:
            assert self.third.wait(60)
            time.sleep(0.1)
        if self.third and index == 2:
            self.third.set()
        return super().__getitem__(index)


class Batched(Squares):
    """Takes a whole batch of indices, as a loader without batching may give."""

    def __getitem__(self, index: list[int]) -> tuple[torch.Tensor, int]:
        return torch.tensor([self.items[i] for i in index]), os.getpid()


class Alternating:
    """A batch sampler of one's own: batches of unequal size, as arrays, tuples and tensors."""

    def __iter__(self):
        yield from ([3, 1], (7,), torch.tensor([0, 2, 4]))

    def __len__(self) -> int:
        return 3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


KINDS = {
    "in order": lambda: DataLoader(Squares(), 4),
    "drop_last": lambda: DataLoader(Squares(), 4, drop_last=True),
    "shuffle": lambda: DataLoader(Squares(), 4, shuffle=True),
    "generator": lambda: DataLoader(Squares(), 4, shuffle=True, generator=seeded()),
    "random sampler": lambda: DataLoader(Squares(), 4, sampler=RandomSampler(range(N), generator=seeded())),
    "weighted": lambda: DataLoader(
        Squares(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 30, generator=seeded())
    ),
    "distributed": lambda: DataLoader(Squares(), 2, sampler=DistributedSampler(range(N), 3, 1, seed=5)),
    "list of indices": lambda: DataLoader(Squares(), 2, sampler=[5, 3, 9]),
    "subset": lambda: DataLoader(Subset(Squares(), [8, 6, 4, 2]), 3, shuffle=True),
    "batch sampler": lambda: DataLoader(Squares(), batch_sampler=BatchSampler(SequentialSampler(range(N)), 3, True)),
    "own batch sampler": lambda: DataLoader(Squares(), batch_sampler=Alternating()),
    "no batching": lambda: DataLoader(
        Batched(), batch_size=None, sampler=BatchSampler(RandomSampler(range(N), generator=seeded()), 4, False)
    ),
    "workers": lambda: DataLoader(Squares(), 2, shuffle=True, num_workers=2, multiprocessing_context="fork"),
    "workers, no batching": lambda: DataLoader(
        Batched(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(N)), 2, False),
        num_workers=2,
        multiprocessing_context="fork",
    ),
    "persistent workers": lambda: persistent(),
}


def persistent(workers: int = 2) -> DataLoader:
    return DataLoader(
        Squares(), 2, shuffle=True, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )


def content(batch) -> list[int]:
    return torch.as_tensor(batch[0]).tolist()


def of(loader: DataLoader, index: torch.Tensor) -> list[int]:
    """What the data set itself has for these indices."""
    dataset = loader.dataset
    return content(dataset[index.tolist()]) if isinstance(dataset, Batched) else [dataset[int(i)][0] for i in index]


def state(loader: DataLoader) -> dict:
    """Which objects a loader, its data set and its samplers hold."""
    things = {"loader": loader, "dataset": loader.dataset, "sampler": loader.sampler, "batch": loader.batch_sampler}
    return {
        (name, key): id(value)
        for name, thing in things.items()
        for key, value in getattr(thing, "__dict__", {}).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_indices_are_the_data_sets_own_and_the_stream_is_the_loaders(kind):
    ours, plain = KINDS[kind](), KINDS[kind]()
    for epoch in range(2):
        for loader in (ours, plain):
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(epoch)
        torch.manual_seed(epoch)
        expected = [content(batch) for batch in plain]
        torch.manual_seed(epoch)
        untouched = state(ours)
        drawn = list(flatmin.with_indices(ours))
        assert state(ours) == untouched
        assert [content(batch) for _, batch in drawn] == expected
        for index, batch in drawn:
            assert (index.dtype, index.ndim, index.device.type) == (torch.int64, 1, "cpu")
            assert of(ours, index) == content(batch)
        assert len(flatmin.with_indices(ours)) == len(plain) == len(drawn)


def test_distributed_sampler_deals_anew_when_told_the_epoch():
    loader = KINDS["distributed"]()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([index for index, _ in flatmin.with_indices(loader)]).tolist())
    assert epochs[0] != epochs[1]


def test_global_generator_is_left_where_the_plain_loader_leaves_it():
    states = []
    for wrap in (iter, flatmin.with_indices):
        torch.manual_seed(0)
        list(wrap(KINDS["shuffle"]()))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["shuffle", "workers", "persistent workers"])
def test_iteration_after_an_early_break(kind):
    loader = KINDS[kind]()
    once = flatmin.with_indices(loader)
    for indexed in (once, once, flatmin.with_indices(loader)):
        for index, batch in indexed:
            assert of(loader, index) == content(batch)
            break
    drawn = list(once)
    assert sorted(torch.cat([index for index, _ in drawn]).tolist()) == list(range(N))
    assert all(of(loader, index) == content(batch) for index, batch in drawn)


@pytest.mark.parametrize("kind", ["shuffle", "workers"])
@pytest.mark.parametrize("share", [True, False])
def test_interleaved_iterations_keep_their_own_indices(kind, share):
    loader = KINDS[kind]()
    first = flatmin.with_indices(loader)
    second = first if share else flatmin.with_indices(loader)
    seen = []
    for pair in zip(first, second, strict=True):
        for index, batch in pair:
            assert of(loader, index) == content(batch)
            seen += index.tolist()
    assert sorted(seen) == sorted([*range(N), *range(N)])


def test_interleaved_iterations_over_persistent_workers_never_give_a_wrong_index():
    loader = persistent()
    older = iter(flatmin.with_indices(loader))
    pairs = [next(older)]
    pairs += [*flatmin.with_indices(loader), *older]
    assert all(of(loader, index) == content(batch) for index, batch in pairs)


def test_plain_iteration_in_between_disturbs_nothing():
    loader = KINDS["shuffle"]()
    for index, batch in flatmin.with_indices(loader):
        assert len(list(loader)) == len(loader)
        assert of(loader, index) == content(batch)


def test_persistent_workers_persist():
    loader, workers = persistent(), []
    for epoch in range(3):
        drawn = list(flatmin.with_indices(loader))
        assert sorted(torch.cat([index for index, _ in drawn]).tolist()) == list(range(N)), epoch
        assert all(of(loader, index) == content(batch) for index, batch in drawn)
        workers.append({pid for _, (_, pids) in drawn for pid in pids.tolist()})
    assert workers[0] == workers[1] == workers[2]
    assert len(workers[0]) == 2
    assert os.getpid() not in workers[0]


def test_persistent_workers_end_with_their_loader():
    loader = persistent(workers=1)
    pids = {pid for _, (_, some) in flatmin.with_indices(loader) for pid in some.tolist()}
    del loader
    gc.collect()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_persistent_loader_that_was_iterated_plainly_before():
    loader = persistent(workers=1)
    list(loader)
    assert all(of(loader, index) == content(batch) for index, batch in flatmin.with_indices(loader))
    list(loader)


def test_custom_collate_function_sees_the_samples_as_ever():
    loader = DataLoader(Squares(), 4, shuffle=True, collate_fn=lambda samples: {"squares": [s[0] for s in samples]})
    for index, batch in flatmin.with_indices(loader):
        assert batch == {"squares": of(loader, index)}


def test_index_is_not_the_samplers_own_memory():
    own = torch.arange(4)
    loader = DataLoader(Squares(), batch_sampler=[own])
    for index, _ in flatmin.with_indices(loader):
        index.zero_()
    assert torch.equal(own, torch.arange(4))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(N))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless()), "Endless, is iterable .*MESA"),
        ([(1, 2)], "must be a torch.utils.data.DataLoader, got list"),
        (Squares(), "must be a torch.utils.data.DataLoader, got Squares"),
    ],
)
def test_unfit_loader_is_explained(loader, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.with_indices(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_come_in_another_order_have_their_own_indices(workers):
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Late(workers), 2, in_order=False, **more)
    pairs = list(flatmin.with_indices(loader))
    assert all(of(loader, index) == content(batch) for index, batch in pairs)
    order = torch.cat([index for index, _ in pairs]).tolist()
    assert (order == list(range(N))) == (workers == 0)


@pytest.mark.parametrize("keys", [["a", "b"], [0.0, 1.0], [True, False], [None]])
def test_keys_that_are_no_integers_are_explained(keys):
    loader = DataLoader(dict.fromkeys(keys, 1), batch_size=2, sampler=keys)
    with pytest.raises(InvalidArgumentError, match="must give integer indices"):
        list(flatmin.with_indices(loader))


def test_keys_that_are_pairs_are_explained():
    loader = DataLoader({(0, 32): 1, (1, 64): 2}, batch_size=2, sampler=[(0, 32), (1, 64)])
    with pytest.raises(InvalidArgumentError, match="must give integer indices"):
        list(flatmin.with_indices(loader))


class Skipping(DataLoader):
    """Resumes in the middle of an epoch, by hand."""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number >= 2:
                yield batch


class Stateful(DataLoader):
    """Resumes as torchdata's StatefulDataLoader does, by an iterator of its own."""

    def _get_iterator(self):
        iterator = super()._get_iterator()
        next(iterator)
        return iterator


class OneIterator(DataLoader):
    """Keeps one iterator for all epochs, as timm's MultiEpochsDataLoader does."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.iterator = super().__iter__()

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


class OtherSampler(DataLoader):
    @property
    def _index_sampler(self):
        return BatchSampler(range(N - 1, -1, -1), 4, False)


class Adapter:
    """Stands before a loader and takes its class too, as what accelerate's prepare returns."""

    def __init__(self, base):
        self.base_dataloader = base
        self.__class__ = type("Adapter", (Adapter, type(base)), {})

    def __getattr__(self, name):
        if name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __iter__(self):
        yield from self.base_dataloader


UNTRUE = {
    "skips": lambda **more: Skipping(Squares(), 4, **more),
    "resumes": lambda **more: Stateful(Squares(), 4, **more),
    "one iterator": lambda **more: OneIterator(Squares(), 4, **more),
    "adapter": lambda **more: Adapter(DataLoader(Squares(), 4, **more)),
}


@pytest.mark.parametrize("kind", UNTRUE)
@pytest.mark.parametrize("options", [{}, {"shuffle": True}])
def test_a_loader_that_iterates_in_its_own_way_is_refused_with_the_way_out(kind, options):
    with pytest.raises(InvalidArgumentError, match=r"has its own _.* make it of flatmin.indexed\(dataset\)"):
        flatmin.with_indices(UNTRUE[kind](**options))


def test_a_subclass_that_iterates_as_a_dataloader_does_is_fine():
    class Named(DataLoader):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.name = "mine"

    loader = Named(Squares(), 4, shuffle=True)
    assert all(of(loader, index) == content(batch) for index, batch in flatmin.with_indices(loader))


def test_a_loader_that_draws_by_another_sampler_gives_what_that_one_draws():
    loader = OtherSampler(Squares(), 4)
    assert [index.tolist() for index, _ in flatmin.with_indices(loader)] == list(loader._index_sampler)
    assert all(of(loader, index) == content(batch) for index, batch in flatmin.with_indices(loader))


def test_an_iterator_that_is_not_the_loaders_own_is_explained():
    loader = DataLoader(Squares(), 4)
    other = DataLoader(Squares(), 4)
    loader._get_iterator = lambda: iter(other)
    with pytest.raises(InvalidArgumentError, match=r"DataLoader has its own _get_iterator"):
        flatmin.with_indices(loader)


def test_what_a_loader_is_asked_for_it_still_has():
    loader = KINDS["distributed"]()
    wrapped = flatmin.with_indices(loader)
    assert isinstance(wrapped, DataLoader)
    for name in ("sampler", "batch_sampler", "batch_size", "num_workers", "drop_last", "generator"):
        assert getattr(wrapped, name) is getattr(loader, name)
    wrapped.sampler.set_epoch(7)
    assert loader.sampler.epoch == 7
    assert len(wrapped.dataset) == len(loader.dataset)


@pytest.mark.parametrize("kind", ["distributed", "weighted", "no batching"])
def test_twice_is_once_and_a_pickle_is_the_same(kind):
    loader = KINDS[kind]()
    for wrapped in (flatmin.with_indices(loader), flatmin.with_indices(flatmin.with_indices(loader))):
        for pairs in (wrapped, pickle.loads(pickle.dumps(wrapped))):
            assert all(of(loader, index) == content(batch) for index, batch in pairs)


def sorted_in_place(samples):
    samples.sort(key=lambda sample: -sample[0])
    return default_collate(samples)


def sorted_anew(samples):
    return default_collate(sorted(samples, key=lambda sample: -sample[0]))


def sorted_in_a_mapping(samples):
    return {"x": default_collate([value for value, _ in sorted(samples, reverse=True)]).float()}


def dropped_in_place(samples):
    del samples[1]
    return default_collate(samples)


@pytest.mark.parametrize("collate", [sorted_anew, sorted_in_a_mapping])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_fn_that_changes_the_order_is_refused(collate, workers):
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Squares(), 4, collate_fn=collate, **more)
    with pytest.raises(InvalidArgumentError, match=r"sorts, drops or moves samples(.|\n)*enforce_sorted=False"):
        list(flatmin.with_indices(loader))


@pytest.mark.parametrize("collate", [sorted_in_place, dropped_in_place])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_fn_that_changes_its_list_is_followed(collate, workers):
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Squares(), 4, shuffle=True, collate_fn=collate, **more)
    pairs = list(flatmin.with_indices(loader))
    assert all(of(loader, index) == content(batch) for index, batch in pairs)
    assert sum(len(index) for index, _ in pairs) == N - (3 if collate is dropped_in_place else 0)


def mixed(samples):
    values, pids = default_collate(samples)
    return values + values.flip(0), values, values.flip(0), pids


def transformed_in_place(samples):
    samples[:] = [(value + 1, pid) for value, pid in samples]
    return default_collate(samples)


KEEPING = {
    "mixup": mixed,
    "transformed in place": transformed_in_place,
    "classes that are swapped": lambda samples: 1 - torch.tensor([value % 2 for value, _ in samples]),
    "brain floats": lambda samples: torch.tensor([value for value, _ in samples], dtype=torch.bfloat16),
    "freed": lambda samples: (default_collate(samples), samples.clear()),
    "strings": lambda samples: [str(value) for value, _ in samples],
    "floats": lambda samples: torch.tensor([value for value, _ in samples], dtype=torch.float64),
    "of unequal length": lambda samples: torch.nn.utils.rnn.pad_sequence([torch.arange(v + 1) for v, _ in samples]),
}


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_collate_fn_that_keeps_the_order_is_none_the_wiser(kind, shuffle):
    loader = DataLoader(Squares(), 4, shuffle=shuffle, collate_fn=KEEPING[kind])
    assert sorted(torch.cat([index for index, _ in flatmin.with_indices(loader)]).tolist()) == list(range(N))
