"""A small problem that ranks solve together, each with its share of every batch, or one process alone."""

import copy

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

C, B = 3, 16


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(6) if norm else nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, C)).double()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the step's batch; without ranks, all of it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, 4, generator=generator, dtype=torch.float64)
    x[B // 2 :] += 1  # the shares differ in kind, so that it matters whose gradient is taken
    y = torch.randint(C, (B,), generator=generator)
    return x.chunk(world())[rank()], y.chunk(world())[rank()]


def replicated(norm: bool = False) -> DistributedDataParallel:
    return DistributedDataParallel(network(norm))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the whole weights, put together from their shards where they are sharded."""
    gathered = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in copy.copy(list(model.parameters())))
    return [p.detach().clone() for p in gathered]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_close(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def differ(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return any((a - b).abs().max() > 1e-4 for a, b in zip(left, right, strict=True))
