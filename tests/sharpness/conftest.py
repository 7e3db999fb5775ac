"""Small networks in float64, with batches of unequal size, and one with everything that could be disturbed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def network():
    """A smooth network of 43 weights, so that its full Hessian is at hand."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).double()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    sizes = (6, 3, 1)
    return [(torch.randn(size, 3, generator=generator, dtype=torch.float64), torch.arange(size) % 3) for size in sizes]


@pytest.fixture
def whole(batches):
    """All samples as one batch."""
    return [tuple(torch.cat(column) for column in zip(*batches, strict=True))]


@pytest.fixture
def delicate():
    """A network in mixed modes, with gradients, frozen weights and buffers; and its batches, drawn at random."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    model[1].eval()
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    F.cross_entropy(model(x), y).backward()
    dataset = torch.utils.data.TensorDataset(x, y)
    return model, torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True)
