"""indexed: with every data set, collate function and loader, each row has the index of the sample that it is."""

import copy
import itertools
import pickle
from collections import UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.indices import Indexed, IndexedDataset, collate, split

# torchdata's own, in torch >= 2.10
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
N = 13
Point = namedtuple("Point", ["x", "y"])


def text(i):
    """A sentence of varied length that says which it is, first."""
    return torch.tensor([10 * i] + [1] * (i * 5 % 7))


class Items(Dataset):
    """What a list holds, and things that data sets have besides."""

    def __init__(self, make):
        self.items = [make(i) for i in range(N)]
        self.targets = [i % 2 for i in range(N)]
        self.transform = None
        self.epoch = -1

    @property
    def classes(self):
        return ["even", "odd"]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class ByBatch(Items):
    """Reads a list of samples at once."""

    def __getitems__(self, indices):
        return [self.items[i] for i in indices]


def pair(i):
    return torch.tensor([10.0 * i, 0.5]), i % 2


def mapping(i):
    return {"x": torch.tensor([10.0 * i, 0.5]), "labels": i % 2}


def hugging(format=None):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"x": [[10.0 * i, 0.5] for i in range(N)], "labels": [i % 2 for i in range(N)]})
    return made.with_format(format) if format else made


# The first number of each sample is ten times its index.
DATASETS = {
    "tensors": lambda: TensorDataset(torch.arange(N) * 10, torch.arange(N) % 2),
    "pairs": lambda: Items(pair),
    "pairs by batch": lambda: ByBatch(pair),
    "mappings": lambda: Items(mapping),
    "mappings by batch": lambda: ByBatch(mapping),
    "mappings of a kind": lambda: Items(lambda i: UserDict(mapping(i))),
    "single tensors": lambda: Items(lambda i: torch.tensor(10 * i)),
    "numbers": lambda: Items(lambda i: 10 * i),
    "strings": lambda: Items(lambda i: str(10 * i)),
    "named tuples": lambda: Items(lambda i: Point(10 * i, i % 2)),
    "nested": lambda: Items(lambda i: ({"a": [10 * i, {"b": i}]}, i)),
    "list": lambda: [10 * i for i in range(N)],
    "tensor": lambda: torch.arange(N) * 10,
    "by number": lambda: {i: 10 * i for i in range(N)},
    "subset": lambda: Subset(Items(lambda i: 10 * (7 - i)), [7, 6, 5, 4, 3]),
    "concat": lambda: ConcatDataset([[0, 10, 20], [30, 40, 50, 60]]),
    "stack": lambda: StackDataset(torch.arange(N) * 10, torch.arange(N)),
    "hugging face": hugging,
    "hugging face, torch": lambda: hugging("torch"),
}


def said(batch):
    """Which samples a batch holds, by its content."""
    if hasattr(batch, "keys"):
        return said(next(batch[key] for key in batch if key != "index"))
    if isinstance(batch, (list, tuple)):
        first = batch[0]
        if not isinstance(first, str) and getattr(first, "ndim", 1):  # columns, and not the samples themselves
            return said(first)
        batch = torch.tensor([float(each) for each in batch])
    batch = batch.float() / 10
    return (batch if batch.ndim == 1 else batch[:, 0]).tolist()


def assert_right(pairs, samples=None):
    pairs = list(pairs)
    for index, batch in pairs:
        assert index.dtype == torch.int64
        assert index.tolist() == said(batch)
    if samples is not None:
        assert sorted(torch.cat([index for index, _ in pairs]).tolist()) == samples


def key_by_key(samples):
    """As the collate functions of trainers for text do: a mapping, of chosen keys."""
    if hasattr(samples[0], "keys"):
        return {"x": default_collate([each["x"] for each in samples])}
    return {"values": default_collate(samples)}


COLLATE = {"none": None, "default": default_collate, "key by key": key_by_key}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("kind", COLLATE)
def test_every_data_set_and_collate_function(dataset, kind):
    plain, inner = DATASETS[dataset](), COLLATE[kind]
    given = inner and collate(inner)
    whole = list(range(len(plain)))
    indexed = flatmin.indexed(plain)
    assert len(indexed) == len(plain)
    assert_right(map(split, DataLoader(indexed, 4, shuffle=True, collate_fn=given)), whole)
    assert_right(flatmin.with_indices(DataLoader(indexed, 4, shuffle=True, collate_fn=given)), whole)
    assert_right(flatmin.with_indices(DataLoader(plain, 4, shuffle=True, collate_fn=inner)), whole)
    got = [batch for _, batch in flatmin.with_indices(DataLoader(indexed, 4, collate_fn=given))]
    if dataset == "strings" and given is None:  # in a named tuple torch has tuples of them, elsewhere lists
        got = list(map(list, got))
    assert repr(got) == repr(list(DataLoader(plain, 4, collate_fn=inner)))


class Substituting(Items):
    """Gives another sample in place of each third, and says which."""

    def __getitem__(self, i):
        j = (i + 1) % N if i % 3 == 0 else i
        return Indexed(torch.tensor(j) if i % 2 else j - N, super().__getitem__(j))


@pytest.mark.parametrize("sample", [lambda i: 10 * i, lambda i: {"x": 10 * i}], ids=["number", "mapping"])
@pytest.mark.parametrize("several", [False, True])
def test_a_data_set_that_gives_another_sample_says_which(sample, several):
    plain = Substituting(sample)
    if several:
        plain.__class__ = type("", (Substituting,), {"__getitems__": lambda self, keys: [self[key] for key in keys]})
    given = sorted((i + 1) % N if i % 3 == 0 else i for i in range(N))
    assert given != list(range(N))
    assert_right(flatmin.with_indices(DataLoader(plain, 4, shuffle=True)), given)
    assert_right(map(split, DataLoader(flatmin.indexed(plain), 4, shuffle=True)), given)
    assert_right(flatmin.with_indices(DataLoader(flatmin.indexed(plain), 4, collate_fn=collate(key_by_key))), given)


def test_mappings_that_cannot_be_changed():
    data = flatmin.indexed([MappingProxyType({"x": 10 * i}) for i in range(N)])
    assert_right(flatmin.with_indices(DataLoader(data, 4, shuffle=True)), list(range(N)))


LOADERS = {
    "in order": lambda data: DataLoader(data, 4),
    "drop_last": lambda data: DataLoader(data, 4, shuffle=True, drop_last=True),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 20)),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler([3, 1, 12, 5], 3, False)),
    "backwards": lambda data: DataLoader(data, 4, sampler=range(-1, -N - 1, -1)),
    "distributed": lambda data: DataLoader(data, 4, sampler=DistributedSampler(range(N), 2, 1)),
    "no batching": lambda data: DataLoader(data, batch_size=None, sampler=BatchSampler([3, 1, 12, 5], 3, False)),
    "forked workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2, multiprocessing_context="fork"),
    "out of order": lambda data: DataLoader(data, 4, num_workers=2, in_order=False, multiprocessing_context="fork"),
    "persistent workers": lambda data: DataLoader(
        data, 4, shuffle=True, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    ),
    "stateful": lambda data: stateful()(data, 4, shuffle=True),
    "stateful workers": lambda data: stateful()(data, 4, num_workers=2, multiprocessing_context="fork"),
}


def stateful():
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dataset", ["tensors", "mappings"])
def test_every_loader(kind, dataset):
    plain = TensorDataset(torch.arange(N) * 10)
    if dataset == "mappings":
        plain = Rows(torch.arange(N) * 10)
    loader = LOADERS[kind](flatmin.indexed(plain))
    for epoch in range(2):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        assert_right(flatmin.with_indices(loader))
        assert_right(map(split, loader))


class Rows(Dataset):
    """Mappings, of one sample or of several."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i]}


def test_what_workers_get_by_pickle():
    made = flatmin.indexed(Rows(torch.arange(N) * 10)), collate(default_collate)
    data, collate_fn = pickle.loads(pickle.dumps(made))
    assert_right(map(split, DataLoader(data, 5, collate_fn=collate_fn)), list(range(N)))
    assert pickle.loads(pickle.dumps(Indexed(3, "a"))) == Indexed(3, "a")


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_loader_of_mappings_is_copied_and_pickled(clone):
    loader = flatmin.with_indices(DataLoader(flatmin.indexed(Rows(torch.arange(N) * 10)), 4, shuffle=True))
    assert_right(clone(loader), list(range(N)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_that_resumes_in_an_epoch(workers):
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}

    def make():
        data = flatmin.indexed(TensorDataset(torch.arange(N) * 10))
        return stateful()(data, 2, shuffle=True, generator=torch.Generator().manual_seed(1), **more)

    first = make()
    done = [index for index, _ in itertools.islice(flatmin.with_indices(first), 3)]
    second = make()
    second.load_state_dict(first.state_dict())
    rest = list(flatmin.with_indices(second))
    assert_right(rest)
    assert sorted(torch.cat([*done, *(index for index, _ in rest)]).tolist()) == list(range(N))


def test_a_loader_with_its_own_way_of_iterating():
    class Skipping(DataLoader):
        def __iter__(self):
            return itertools.islice(super().__iter__(), 2, None)

    loader = Skipping(flatmin.indexed(TensorDataset(torch.arange(N) * 10)), 4, shuffle=True)
    assert_right(flatmin.with_indices(loader))
    assert len(list(flatmin.with_indices(loader))) == 2


# Collate functions that sort, each with what it says of its samples.


def longest_first(samples):
    return sorted(samples, key=lambda sample: -len(sample[0]))


def padded(samples, **options):
    texts, labels = zip(*samples, strict=True)
    return pad_sequence(list(texts), **options), torch.tensor(labels)


def sorts_in_place(samples):
    samples.sort(key=lambda sample: -len(sample[0]))
    return padded(samples, batch_first=True)


def drops_in_place(samples):
    samples[:] = [sample for sample in samples if len(sample[0]) > 2]
    return padded(samples, batch_first=True)


def keeps(samples):
    return padded(samples, batch_first=True)


def keeps_time_first(samples):
    texts, labels = padded(samples)
    return [texts[0], texts, labels]


def sorts_indexed(samples):
    samples = sorted(samples, key=lambda sample: -len(sample.sample[0]))
    return Indexed(torch.tensor([each.index for each in samples]), keeps([each.sample for each in samples]))


RIGHT = {"sorts in place": sorts_in_place, "drops in place": drops_in_place, "keeps": keeps, "time": keeps_time_first}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("way", ["indexed", "with_indices"])
def test_a_collate_function_of_sentences(kind, way):
    plain, order = Items(lambda i: (text(i), i % 2)), [*range(6, -1, -1), *range(7, N)]
    if way == "indexed":
        loader = DataLoader(flatmin.indexed(plain), 5, sampler=order, collate_fn=collate(RIGHT[kind]))
    else:
        loader = DataLoader(plain, 5, sampler=order, collate_fn=RIGHT[kind])
    assert_right(flatmin.with_indices(loader))


def test_a_collate_function_that_sorts_samples_with_their_index():
    loader = DataLoader(flatmin.indexed(Items(lambda i: (text(i), i % 2))), 5, shuffle=True, collate_fn=sorts_indexed)
    assert_right(flatmin.with_indices(loader), list(range(N)))


@pytest.mark.parametrize("sort", [lambda each: -len(each["x"]), lambda each: each["labels"]])
def test_a_sorting_collate_function_that_leaves_the_key_is_right(sort):
    def sorts(samples):
        samples = sorted(samples, key=sort)
        rest = {key: torch.tensor([each[key] for each in samples]) for key in samples[0] if key != "x"}
        return {"x": pad_sequence([each["x"] for each in samples], batch_first=True), **rest}

    data = flatmin.indexed(Items(lambda i: {"x": text(i), "labels": i % 2}))
    for given in (sorts, collate(sorts)):
        assert_right(flatmin.with_indices(DataLoader(data, 5, shuffle=True, collate_fn=given)), list(range(N)))


def of_chosen_keys(samples):
    samples = sorted(samples, key=lambda each: -len(each["x"]))
    x, y = keeps([(each["x"], each["labels"]) for each in samples])
    return {"x": x, "y": y}


SORTING = {
    "padded": lambda samples: padded(longest_first(samples), batch_first=True),
    "padded on the left": lambda samples: padded(longest_first(samples), batch_first=True, padding_side="left"),
    "time first": lambda samples: padded(longest_first(samples)),
    "sentences alone": lambda samples: padded(longest_first(samples), batch_first=True)[0],
    "packed": lambda samples: torch.nn.utils.rnn.pack_sequence([text for text, _ in longest_first(samples)]),
    "two labels alone": lambda samples: torch.tensor([label for _, label in longest_first(samples)]),
    "computed, and two labels": lambda samples: [
        torch.tensor([float(text.sum()) for text, _ in longest_first(samples)]),
        torch.tensor([label for _, label in longest_first(samples)]),
    ],
}


@pytest.mark.parametrize("kind", SORTING)
@pytest.mark.parametrize("way", ["indexed", "with_indices"])
def test_a_collate_function_that_makes_a_sorted_copy_is_refused(kind, way):
    plain = Items(lambda i: (text(i), i % 2))
    if way == "indexed":
        loader = DataLoader(flatmin.indexed(plain), 5, collate_fn=collate(SORTING[kind]))
    else:
        loader = DataLoader(plain, 5, collate_fn=SORTING[kind])
    with pytest.raises(InvalidArgumentError, match=r"sorts, drops or moves(.|\n)*sort the samples of flatmin.indexed"):
        list(flatmin.with_indices(loader))


@pytest.mark.parametrize("lists", [False, True])
def test_a_collate_function_that_sorts_mappings_and_drops_the_key_is_refused(lists):
    data = Items(lambda i: {"x": text(i).tolist() if lists else text(i), "labels": i % 2})
    given = (lambda samples: of_chosen_keys([{**e, "x": torch.tensor(e["x"])} for e in samples])) if lists else None
    loader = DataLoader(flatmin.indexed(data), 5, collate_fn=collate(given or of_chosen_keys))
    with pytest.raises(InvalidArgumentError, match="sorts, drops or moves"):
        list(loader)


INNOCENT = {
    "classes with other names": lambda samples: 1 - torch.tensor([label for _, label in samples]),
    "mixup": lambda samples: [torch.tensor([s[1] for s in each]) for each in (samples, longest_first(samples))],
    "one class": lambda samples: torch.ones(len(samples), dtype=torch.int64),
    "cut": lambda samples: torch.stack([text[:1] + 1 for text, _ in samples]),
    "sums": lambda samples: sum(text.sum() for text, _ in samples),
    "no tensors": lambda samples: None,
    "cleared": lambda samples: (torch.tensor([label for _, label in samples]), samples.clear()),
    "filled": lambda samples: samples.append(None),
}


@pytest.mark.parametrize("kind", INNOCENT)
def test_a_collate_function_that_moves_nothing_is_not_accused(kind):
    loader = DataLoader(flatmin.indexed(Items(lambda i: (text(i), i % 2))), 5, collate_fn=collate(INNOCENT[kind]))
    assert torch.cat([index for index, _ in flatmin.with_indices(loader)]).tolist() == list(range(N))


def test_samples_that_are_one_object_keep_their_indices_apart():
    loader = DataLoader(flatmin.indexed([None] * N), 4, collate_fn=collate(lambda samples: len(samples)))
    assert [(index.tolist(), batch) for index, batch in loader][-1] == ([12], 1)


@pytest.mark.parametrize("samples", ["pairs", "mappings"])
def test_a_batch_of_nothing(samples):
    batches = [[3], [], [1, 2]]
    data = flatmin.indexed(DATASETS[samples]())
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate(len))
    assert [(index.tolist(), batch) for index, batch in flatmin.with_indices(loader)] == [
        (batch, len(batch)) for batch in batches
    ]


def test_a_batch_that_its_data_set_has_put_together():
    class Together(TensorDataset):
        def __getitems__(self, indices):
            return tuple(tensor[indices] for tensor in self.tensors)

    data = flatmin.indexed(Together(torch.arange(N) * 10, torch.arange(N)))
    for given in (lambda batch: batch, collate(lambda batch: batch)):
        assert_right(flatmin.with_indices(DataLoader(data, 4, shuffle=True, collate_fn=given)), list(range(N)))
    loader = DataLoader(data.dataset, 4, shuffle=True, collate_fn=lambda batch: batch)
    assert_right(flatmin.with_indices(loader), list(range(N)))


# What a data set with indices is besides.


def test_attributes_are_the_data_sets_own():
    plain = Items(pair)
    data = flatmin.indexed(plain)
    assert data.classes == ["even", "odd"]
    assert data.targets is plain.targets
    data.transform = len
    assert plain.transform is len
    data.set_epoch(3)
    assert plain.epoch == 3
    assert not hasattr(data, "nothing of the kind")
    with pytest.raises(AttributeError, match="'Items' object has no attribute 'samples'"):
        data.samples  # noqa: B018


def test_columns_and_features_of_hugging_face():
    data = flatmin.indexed(hugging())
    assert data.column_names == ["x", "labels"]
    assert set(data.features) == {"x", "labels"}
    assert list(data["labels"]) == [i % 2 for i in range(N)]
    assert data[3:5]["index"].tolist() == [3, 4]
    assert data[[5, 2]]["labels"] == [1, 0]
    assert data[-1]["index"] == N - 1


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_and_pickles(clone):
    data = clone(flatmin.indexed(Rows(torch.arange(N) * 10), key="row"))
    assert (type(data), len(data), data.index_key) == (IndexedDataset, N, "row")
    assert data[4] == {"x": torch.tensor(40), "row": 4}


def test_samples_of_the_data_set_are_not_changed():
    plain = Items(mapping)
    assert flatmin.indexed(plain)[2]["index"] == 2
    assert "index" not in plain[2]
    batch = {"x": torch.arange(2), "index": torch.arange(2)}
    split(batch)
    assert "index" in batch


def test_iteration_gives_each_sample_once():
    assert list(flatmin.indexed(["a", "b"])) == [(0, "a"), (1, "b")]
    assert list(map(tuple, flatmin.indexed(torch.arange(2)))) == [(0, 0), (1, 1)]


def test_parts_have_the_indices_of_the_whole():
    train, rest = random_split(flatmin.indexed(TensorDataset(torch.arange(N) * 10)), [8, N - 8])
    pairs = [*flatmin.with_indices(DataLoader(train, 4, shuffle=True)), *flatmin.with_indices(DataLoader(rest, 4))]
    assert_right(pairs, list(range(N)))


def test_another_key():
    data = flatmin.indexed(Items(lambda i: {"index": torch.tensor(10 * i)}), key="row")
    loader = DataLoader(data, 4, shuffle=True, collate_fn=collate(default_collate, key="row"))
    for batch in loader:
        assert (batch["row"] * 10).tolist() == batch["index"].tolist()
    for index, batch in flatmin.with_indices(loader):
        assert list(batch) == ["index"]
        assert (index * 10).tolist() == batch["index"].tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


REFUSED = {
    "iterable": (Stream, "Stream, is iterable and has no indices; use flatmin.MESA"),
    "generator": (lambda: (i for i in range(3)), "generator, is iterable and has no indices"),
    "hugging face stream": (lambda: hugging().to_iterable_dataset(), "is iterable and has no indices"),
    "loader": (lambda: DataLoader([1]), "got a DataLoader: use flatmin.with_indices"),
    "number": (lambda: 3, r"map-style data set, which has dataset\[i\], got 3"),
    "string": (lambda: "abc", "map-style data set"),
    "parts by name": (lambda: {"train": [1], "test": [2]}, "read by names; give one of its parts, such as that of 'tr"),
    "twice": (lambda: flatmin.indexed([1]), "carries its indices already"),
    "twice, in a part": (lambda: Subset(flatmin.indexed([1]), [0]), "carries its indices already"),
    "twice, in a sum": (lambda: ConcatDataset([flatmin.indexed([1])]), "carries its indices already"),
    "sum": (lambda: ConcatDataset([flatmin.indexed([1]), flatmin.indexed([2])]), "have the same index"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_indices_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.indexed(make())


def test_sums_are_made_first():
    with pytest.raises(InvalidArgumentError, match="call indexed on their sum"):
        flatmin.indexed([1]) + flatmin.indexed([2])
    loader = DataLoader(ConcatDataset([flatmin.indexed([1]), [(0, 2)]]))
    with pytest.raises(InvalidArgumentError, match=r"have the same index: call indexed on the whole"):
        flatmin.with_indices(loader)


@pytest.mark.parametrize("key", ["", None, 3])
def test_a_key_is_a_name(key):
    with pytest.raises(InvalidArgumentError, match="key must be a name"):
        flatmin.indexed([1], key=key)


@pytest.mark.parametrize("keys", [["a"], [0.5], [True], [(0, 1)], [None]])
def test_keys_that_are_no_integers_are_explained(keys):
    data = flatmin.indexed(dict.fromkeys([0, *keys], 1))
    with pytest.raises(InvalidArgumentError, match="must give integer indices"):
        list(DataLoader(data, sampler=keys))


def test_a_name_that_is_taken_is_explained():
    with pytest.raises(InvalidArgumentError, match=r"'index' already in dict of index.*flatmin.indexed\(dataset, key="):
        flatmin.indexed([{"index": 5}])[0]
    loader = DataLoader(flatmin.indexed([1, 2]), collate_fn=collate(lambda samples: {"index": samples}))
    with pytest.raises(InvalidArgumentError, match="'index' already in dict"):
        list(loader)


@pytest.mark.parametrize(
    ("dataset", "collate_fn"),
    [("tensors", lambda samples: [each.sample for each in samples]), ("mappings", lambda samples: {"x": samples})],
)
def test_a_collate_function_that_loses_the_index_is_explained(dataset, collate_fn):
    loader = DataLoader(flatmin.indexed(DATASETS[dataset]()), collate_fn=collate_fn)
    with pytest.raises(InvalidArgumentError, match=r"carries no index.*flatmin.indices.collate\(collate_fn\)"):
        next(iter(flatmin.with_indices(loader)))


def test_an_index_that_was_padded_or_cast_is_explained():
    with pytest.raises(InvalidArgumentError, match=r"batch must carry integer indices.*tensor\(\[0.5"):
        split({"index": torch.tensor([0.5])})


def test_collate_is_told_what_it_is_for():
    with pytest.raises(InvalidArgumentError, match=r"is for samples of flatmin\.indexed"):
        list(DataLoader([1, 2], collate_fn=collate(default_collate)))
    with pytest.raises(InvalidArgumentError, match=r"got dict without an index.*remove_unused_columns=False"):
        list(DataLoader([{"x": 1}], collate_fn=collate(default_collate)))  # as the Trainer makes it
    with pytest.raises(InvalidArgumentError, match="must be a function"):
        collate([1])
