"""Indices in the loaders that trainers make of a loader: accelerate's, Lightning's and Fabric's, and transformers'."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.indices import collate, split

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
N, B = 30, 4
PLAIN = TensorDataset(torch.arange(N) * 10)
WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
LOADERS = {
    "shuffled": {"shuffle": True},
    "drop_last": {"shuffle": True, "drop_last": True},
    "workers": {"shuffle": True, **WORKERS},
    "persistent workers": {"shuffle": True, "persistent_workers": True, **WORKERS},
}


def samples_of(pairs):
    """The samples of some pairs, each of which must be right."""
    seen = []
    for index, (x,) in pairs:
        assert index.device.type == "cpu"
        assert torch.equal(index * 10, x)
        seen += index.tolist()
    return seen


class Mapped(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": torch.tensor(10 * i)}


@pytest.fixture
def prepare():
    """Accelerate's ``prepare``, by the settings of its loaders."""
    accelerate = pytest.importorskip("accelerate")

    def by(**settings):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        config = accelerate.DataLoaderConfiguration(**settings)
        return accelerate.Accelerator(cpu=True, dataloader_config=config, gradient_accumulation_steps=4)

    return by


@pytest.mark.parametrize("kind", LOADERS)
def test_a_prepared_loader_and_its_epochs(prepare, kind):
    accelerator = prepare()
    options = {"batch_size": B, **LOADERS[kind]}
    loader = accelerator.prepare(DataLoader(PLAIN, **options))
    for epoch in range(3):
        seen = samples_of(flatmin.with_indices(loader))
        assert sorted(seen) == list(range(N)) if kind != "drop_last" else len(seen) == len(set(seen)) == N // B * B
        assert loader.iteration == epoch + 1  # accelerate's count, by which it shuffles
    assert len(flatmin.with_indices(loader)) == len(loader)
    assert all(isinstance(batch, (list, tuple)) and len(batch) == 1 for batch in loader)  # plain again


def test_the_batches_are_those_of_the_prepared_loader(prepare):
    prepared = [prepare(use_seedable_sampler=True).prepare(DataLoader(PLAIN, B, shuffle=True)) for _ in range(2)]
    for loader in prepared:
        loader.set_epoch(5)
        loader.batch_sampler.sampler.initial_seed = 1
    plain = [x.tolist() for _ in range(2) for (x,) in prepared[0]]
    wrapped = flatmin.with_indices(prepared[1])
    assert [x.tolist() for _ in range(2) for _, (x,) in wrapped] == plain
    wrapped.set_epoch(5)
    assert [x.tolist() for _ in range(2) for _, (x,) in wrapped] == plain


@pytest.mark.parametrize("way", ["after", "before", "of indexed"])
def test_accelerate_knows_the_end_of_an_epoch(prepare, way):
    accelerator = prepare()
    make = {
        "after": lambda: flatmin.with_indices(accelerator.prepare(DataLoader(PLAIN, B))),
        "before": lambda: accelerator.prepare(flatmin.with_indices(DataLoader(PLAIN, B))),
        "of indexed": lambda: flatmin.with_indices(accelerator.prepare(DataLoader(flatmin.indexed(PLAIN), B))),
    }
    states, model = [], accelerator.prepare(nn.Linear(1, 1))
    for index, (x,) in make[way]():
        assert torch.equal(index * 10, x)
        with accelerator.accumulate(model):
            gradients = accelerator.gradient_state
            states.append((accelerator.sync_gradients, gradients.end_of_dataloader, gradients.remainder))
    assert states == [(i in (3, 7), i == 7, N % B) for i in range(8)]


@pytest.mark.parametrize("way", ["skip(with)", "with(skip)", "skip(indexed)"])
def test_batches_that_accelerate_skips(prepare, way):
    prepared = prepare().prepare(DataLoader(PLAIN if way != "skip(indexed)" else flatmin.indexed(PLAIN), B))
    skip = functools.partial(pytest.importorskip("accelerate").skip_first_batches, num_batches=3)
    pairs = flatmin.with_indices(skip(prepared)) if way == "with(skip)" else skip(flatmin.with_indices(prepared))
    assert samples_of(pairs) == list(range(3 * B, N))


def test_a_prepared_loader_that_resumes_in_an_epoch(prepare):
    pytest.importorskip("torchdata")

    def make():
        order = torch.Generator().manual_seed(1)
        loader = DataLoader(flatmin.indexed(PLAIN), B, sampler=RandomSampler(range(N), generator=order))
        return prepare(use_stateful_dataloader=True).prepare(loader)

    first, second = make(), make()
    done = samples_of(itertools.islice(flatmin.with_indices(first), 3))
    second.load_state_dict(first.state_dict())
    rest = samples_of(flatmin.with_indices(second))
    assert (len(done), sorted(done + rest)) == (3 * B, list(range(N)))
    with pytest.raises(InvalidArgumentError, match=r"StatefulDataLoader has its own .*flatmin.indexed\(dataset\)"):
        flatmin.with_indices(prepare(use_stateful_dataloader=True).prepare(DataLoader(PLAIN)))


def test_a_dispatching_loader_is_refused_with_the_way_out(prepare):
    loader = prepare(dispatch_batches=True).prepare(DataLoader(PLAIN, B))
    with pytest.raises(InvalidArgumentError, match=r"prepare\(with_indices\(loader\)\), or .*flatmin.indexed\(dataset"):
        flatmin.with_indices(loader)


def test_an_index_stays_on_the_cpu_while_its_batch_moves(prepare):
    loader = prepare().prepare(DataLoader(PLAIN, B))
    loader.device = torch.device("meta")
    for _ in range(2):
        index, (x,) = next(iter(flatmin.with_indices(loader)))
        assert (index.tolist(), x.device.type) == (list(range(B)), "meta")


# Lightning replaces the sampler by making the loader anew, of its class and its attributes.


def wrapped(kind):
    if kind == "mapped":
        return flatmin.with_indices(DataLoader(flatmin.indexed(Mapped()), B, shuffle=True))
    return flatmin.with_indices(DataLoader(PLAIN if kind == "plain" else flatmin.indexed(PLAIN), B, shuffle=True))


@pytest.mark.parametrize("kind", ["plain", "indexed", "mapped"])
@pytest.mark.parametrize("trainer", ["fabric", "pytorch"])
def test_lightning_deals_the_samples_to_the_ranks(kind, trainer):
    module = pytest.importorskip(f"lightning.{trainer}.utilities.data")
    ranks = []
    for rank in range(2):
        given = wrapped(kind)
        sampler = DistributedSampler(given.dataset, 2, rank, seed=1)
        loader = module._update_dataloader(given, sampler)
        pairs = [(index, tuple(batch.values()) if kind == "mapped" else batch) for index, batch in loader]
        ranks.append(samples_of(pairs))
        sampler.set_epoch(1)
        assert [index.tolist() for index, _ in loader] != [index.tolist() for index, _ in pairs]
    assert sorted(ranks[0] + ranks[1]) == list(range(N))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own
def test_lightning_trains_with_what_with_indices_returns():
    lightning = pytest.importorskip("lightning")
    sampler = DistributedSampler(PLAIN, 1, 0)
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, _):
            index, (x,) = batch
            seen.append((index.tolist(), x.tolist()))
            return self.layer(x[:, None].float()).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", barebones=True)
    trainer.fit(Module(), flatmin.with_indices(DataLoader(PLAIN, B, sampler=sampler)))
    assert all([10 * i for i in index] == x for index, x in seen)
    assert (len(seen), sampler.epoch) == (16, 1)
    assert seen[:8] != seen[8:]


def test_fabric():
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    of_indexed = fabric.setup_dataloaders(DataLoader(flatmin.indexed(Mapped()), B, shuffle=True))
    assert sorted(samples_of((i, (b["x"],)) for i, b in flatmin.with_indices(of_indexed))) == list(range(N))
    before = fabric.setup_dataloaders(flatmin.with_indices(DataLoader(PLAIN, B, shuffle=True)))
    assert sorted(samples_of(before)) == list(range(N))
    with pytest.raises(InvalidArgumentError, match=r"FabricDataLoader; call with_indices on the DataLoader itself"):
        flatmin.with_indices(fabric.setup_dataloaders(DataLoader(PLAIN, B)))


# transformers: mappings, collate functions that pad, and columns that are taken out.


def sentences():
    """Of varied length; the last token says which it is."""
    return [{"input_ids": [1] * (i * 5 % 7) + [i + 2], "labels": i % 2} for i in range(N)]


def said(batch):
    ends = batch["attention_mask"].sum(1) - 1
    return (batch["input_ids"].gather(1, ends[:, None])[:, 0] - 2).tolist()


@pytest.fixture
def padding():
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, **{str(i): i for i in range(1, N + 2)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]")
    return transformers.DataCollatorWithPadding(tokenizer)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("data", ["list", "datasets"])
def test_a_collator_that_pads(padding, by_length, wrapped, data):
    plain = sentences()
    if data == "datasets":
        plain = pytest.importorskip("datasets").Dataset.from_list(plain)

    def collator(samples):
        return padding(sorted(samples, key=lambda each: len(each["input_ids"])) if by_length else samples)

    loader = DataLoader(flatmin.indexed(plain), B, shuffle=True, collate_fn=collate(collator) if wrapped else collator)
    for batch in loader:
        index, rest = split(batch)
        assert index.tolist() == said(rest)
        assert set(rest) == {"input_ids", "attention_mask", "labels"}
        assert type(rest) is type(batch)


def test_columns_that_are_taken_out_leave_the_index(padding):
    from transformers.trainer_utils import RemoveColumnsCollator

    signature = ["input_ids", "attention_mask", "labels"]
    dropping = RemoveColumnsCollator(padding, signature_columns=signature)
    data = flatmin.indexed([{**each, "title": "a"} for each in sentences()])
    for index, batch in flatmin.with_indices(DataLoader(data, B, shuffle=True, collate_fn=collate(dropping))):
        assert index.tolist() == said(batch)
        assert set(batch) == set(signature)
    with pytest.raises(InvalidArgumentError, match=r"carries no index.*flatmin.indices.collate"):
        next(iter(flatmin.with_indices(DataLoader(data, B, collate_fn=dropping))))
