"""Indices on two ranks: each row has the index of the sample that it is, and the ranks share the samples."""

import os
import warnings

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flatmin
from tests.distributed._spawn import run_ranks

N = 70


def pairs(batches):
    return [(index.tolist(), (x // 10).tolist()) for index, (x,) in batches]


def by_sampler(indexed):
    plain = TensorDataset(torch.arange(N) * 10)
    data = indexed if indexed is not None else plain
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, seed=5))
    wrapped = flatmin.with_indices(loader)
    epochs = []
    for epoch in range(2):
        wrapped.sampler.set_epoch(epoch)
        epochs.append(pairs(wrapped))
    return epochs


PREPARED = ["", "split_batches", "even_batches", "use_seedable_sampler", "use_stateful_dataloader", "dispatch_batches"]


def by_accelerate():
    """For each setting and order of calls, the epochs' pairs."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    import accelerate

    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's own, in torch >= 2.10
    plain = TensorDataset(torch.arange(N) * 10)
    found = {}
    for setting in PREPARED:
        accelerate.state.GradientState._reset_state()
        options = {setting: setting != "even_batches"} if setting else {}
        config = accelerate.DataLoaderConfiguration(**options)
        prepare = accelerate.Accelerator(cpu=True, dataloader_config=config).prepare
        torch.manual_seed(3)
        ways = {
            "of indexed": prepare(DataLoader(flatmin.indexed(plain), 8, shuffle=True)),
            "before": prepare(flatmin.with_indices(DataLoader(plain, 8, shuffle=True))),
        }
        after = prepare(DataLoader(plain, 8, shuffle=True))
        if setting in PREPARED[:4]:
            ways["after"] = after
        else:
            with pytest.raises(flatmin.errors.InvalidArgumentError, match=r"flatmin\.indexed\(dataset\)"):
                flatmin.with_indices(after)
        for way, loader in ways.items():
            found[setting, way] = [pairs(flatmin.with_indices(loader)) for _ in range(2)]
            assert loader.iteration == 2
    return found


def assert_shared(ranks, repeated=12):
    """Pairs are right, the ranks have all samples between them, few twice, and the epochs have other orders."""
    for epochs in ranks:
        assert all(index == samples for epoch in epochs for index, samples in epoch)
        assert epochs[0] != epochs[1]
    for epoch in range(2):
        seen = [i for epochs in ranks for index, _ in epochs[epoch] for i in index]
        assert set(seen) == set(range(N))
        assert len(seen) <= N + repeated


@pytest.mark.parametrize("indexed", [False, True])
def test_the_distributed_sampler(indexed):
    data = flatmin.indexed(TensorDataset(torch.arange(N) * 10)) if indexed else None
    assert_shared(run_ranks(by_sampler, 2, data))


def test_what_accelerate_makes_of_a_loader():
    pytest.importorskip("accelerate")
    pytest.importorskip("torchdata")
    ranks = run_ranks(by_accelerate, 2, timeout=150)
    assert len(ranks[0]) == 16
    for case in ranks[0]:
        assert_shared([found[case] for found in ranks])
