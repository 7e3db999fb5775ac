"""A small network with what goes wrong easily, its data, and a closure that can be made to fail."""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.reference import oracles

C = 3


class Net(nn.Module):
    """Tied weights, a frozen parameter, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, C)
        self.second.weight = self.first.weight
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Problem:
    """A network, its data and a closure that can be made to fail in one of its calls."""

    def __init__(self, model: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = (Net() if model is None else model).to(dtype)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(12, 4, generator=generator).to(dtype)
        self.y = torch.randint(C, (12,), generator=generator)
        self.calls: list[dict[str, torch.Tensor]] = []  # the weights at each
        self.losses: list[torch.Tensor] = []
        self.factor: dict[int, float] = {}  # call -> what the loss is multiplied with
        self.raises: int | None = None

    def sgd(self, **arguments) -> torch.optim.SGD:
        return torch.optim.SGD(self.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **arguments})

    def closure(self, optimizer):
        def closure() -> torch.Tensor:
            self.calls.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x), self.y) * self.factor.get(len(self.calls), 1.0)
            self.losses.append(loss.detach())
            loss.backward()
            if len(self.calls) == self.raises:
                raise ValueError("in the closure")
            return loss.detach()

        return closure

    def steps(self, optimizer, count: int = 1) -> torch.Tensor:
        return torch.stack([optimizer.step(self.closure(optimizer)) for _ in range(count)])

    def state(self, optimizer) -> dict:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": optimizer.state_dict()})

    def gradient(self, names: list[str]) -> oracles.Gradient:
        """The gradient as a function of the weights, for the oracle."""

        def loss(weights: list[torch.Tensor]) -> torch.Tensor:
            outputs = functional_call(self.model, dict(zip(names, weights, strict=True)), (self.x,))
            return F.cross_entropy(outputs, self.y)

        return oracles.autograd(loss)


TRAINED = ["first.weight", "first.bias", "second.bias", "head.weight"]  # second.weight is first.weight


def assert_same(left: object, right: object) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right
