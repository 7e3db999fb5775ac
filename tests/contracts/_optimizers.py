"""All optimizers of flatmin.optim, found there and not by hand, and a small training that each of them can make."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import flatmin

C, B = 3, 12
QUANTIZED = {"SQuAT"}  # which need the step sizes of a quantised network, as `Training` gives them
EVERY = {
    name: kind
    for name, kind in vars(flatmin.optim).items()
    if inspect.isclass(kind) and issubclass(kind, flatmin.optim.SharpnessAware) and not inspect.isabstract(kind)
    if name not in QUANTIZED
}
CLOSURES = [name for name in EVERY if not EVERY[name].per_sample_closure]  # those with a closure as torch's
# The same with those of quantised networks, for what is tested by `Training` alone.
TRAINED = EVERY | {name: getattr(flatmin.optim, name) for name in QUANTIZED}
CLOSED = [name for name in TRAINED if not TRAINED[name].per_sample_closure]
# With these the mechanism is at work in the few steps here.
VISIBLE = {"LookSAM": {"k": 2}, "GSAM": {"alpha": 0.6}, "FriendlySAM": {"lam": 0.6}, "ESAM": {"beta": 0.8}}


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, C))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class FakeQuantizer(nn.Module):
    """Rounds a weight to 4 bits by a learned step size; gradients are passed where nothing is clipped."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(weight.detach().abs().amax() / 7.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        levels = (weight / self.scale).clamp(-8, 7)
        return (levels + (levels.round() - levels).detach()) * self.scale


def step_sizes(model: nn.Module) -> list[nn.Parameter]:
    """Those of a network whose linear layers become quantised here, if they are not yet."""
    for layer in [each for each in model.modules() if isinstance(each, nn.Linear)]:
        if not parametrize.is_parametrized(layer):
            parametrize.register_parametrization(layer, "weight", FakeQuantizer(layer.weight))
    return [each.scale for each in model.modules() if isinstance(each, FakeQuantizer)]


class Training:
    """A network that is trained with one of the optimizers, by any of the ways to make a step.

    Args:
        name: The optimizer's.
        model: The network; `network` by default.
        base: Makes the base optimizer.
        dtype: Of the weights.
        scaler: Scales the loss.
        autocast: What the forward pass is in, if not in the weights' dtype.
        parts: Micro-batches.
        given: Whether the optimizer is given the network.
        **options: For the optimizer.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | None = None,
        *,
        base: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
        dtype: torch.dtype = torch.float64,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        parts: int = 1,
        given: bool = False,
        **options: object,
    ) -> None:
        self.model = network() if model is None else model
        options |= {"step_sizes": step_sizes(self.model)} if name in QUANTIZED else {}
        self.model = self.model.to(dtype)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(B, 4, generator=generator).to(dtype)
        self.y = torch.randint(C, (B,), generator=generator)
        self.own_passes = TRAINED[name].per_sample_closure
        self.scaler, self.autocast, self.parts = scaler, autocast, parts
        options |= {"model": self.model} if given else {}
        self.optimizer = TRAINED[name](base(self.model), rho=0.3, scaler=scaler, **VISIBLE.get(name, {}), **options)
        self.passes = 0  # that were begun
        self.factor: dict[int, float] = {}  # pass -> what its loss is multiplied with
        self.raises = 0  # the pass, from 1, at whose end the closure raises
        self.each_pass: Callable[[], None] = lambda: None

    def losses(self, keep: object) -> torch.Tensor:
        """What ESAM wants of a closure."""
        if torch.is_grad_enabled():
            self._begin()
        found = self._loss(self.x[keep], self.y[keep], "none") * self.factor.get(self.passes, 1.0)
        if torch.is_grad_enabled():
            self._end()
        return found

    def closure(self) -> torch.Tensor:
        """What torch wants of one."""
        self._begin()
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in zip(self.x.chunk(self.parts), self.y.chunk(self.parts), strict=True):
            loss = self._loss(x, y, "mean") * self.factor.get(self.passes, 1.0) / self.parts
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = total + loss.detach()
        self._end()
        return total

    def step(self, count: int = 1) -> list[float]:
        """The losses of some steps; after each the scale is updated."""
        losses = []
        for _ in range(count):
            losses.append(float(self.optimizer.step(self.losses if self.own_passes else self.closure)))
            self.update()
        return losses

    def loop(self, count: int = 1) -> None:
        """The same without a closure."""
        for _ in range(count):
            for _ in self.optimizer.passes():
                self.closure()
            self.update()

    def update(self) -> None:
        if self.scaler is not None:
            self.scaler.update()

    def state(self) -> dict:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def _begin(self) -> None:
        self.passes += 1
        self.each_pass()

    def _end(self) -> None:
        if self.passes == self.raises:
            raise RuntimeError("in the closure")

    def _loss(self, x: torch.Tensor, y: torch.Tensor, reduction: str) -> torch.Tensor:
        with torch.autocast("cpu", self.autocast) if self.autocast else contextlib.nullcontext():
            return F.cross_entropy(self.forward(x), y, reduction=reduction)


def passes_of(name: str, steps: int) -> int:
    """How many passes a step has after ``steps`` steps, all of them measured."""
    training = Training(name)
    training.step(steps)
    before = training.passes
    training.step()
    return training.passes - before


def each_pass(steps: tuple[int, ...] = (2, 3), names: Iterable[str] = EVERY) -> list[tuple[str, int, int]]:
    """Each optimizer, after some steps, and each pass of its next one, from 1."""
    return [(name, step, number) for name in names for step in steps for number in range(1, passes_of(name, step) + 1)]


def assert_same(left: object, right: object) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


def differ(left: dict, right: dict) -> bool:
    return any(not torch.equal(value, right["model"][key]) for key, value in left["model"].items())
