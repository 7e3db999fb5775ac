"""How good a network is on the test set, and the batch-norm statistics with which it is evaluated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _distributed
from ..._rng import preserved
from ...averages._statistics import refresh
from ..problems.batches import drawn_batches, make_loader, size_of
from ..problems.checked import logits_of
from ..problems.problem import Problem
from ..problems.source import NETWORK
from ..recipe import Recipe
from .feed import Feed
from .layout import in_layout

# Training samples, and how many of them at a time, that batch-norm statistics are made anew from.
REFRESHED, AT_A_TIME = 2048, 256


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The precision that a recipe names."""
    dtype = torch.float16 if recipe.precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=recipe.precision != "float32")


def statistics_inputs(problem: Problem) -> Iterator[Tensor]:
    """Yields what batch-norm statistics are made anew from: training samples as they are, not cropped or flipped."""
    for x, _ in drawn_batches(problem.train, REFRESHED, 0, AT_A_TIME):
        if len(x) > 1:  # a single sample has no variance
            yield x


@contextmanager
def fresh_statistics(
    model: nn.Module, network: nn.Module, problem: Problem, recipe: Recipe, device: torch.device, *, stay: bool
) -> Iterator[None]:
    """Inside, a network that is in training has batch-norm statistics made anew.

    Afterwards it has its own again, which averages of it follow, so that training does not feel it.

    Args:
        model: The network.
        network: The same, with its wrappers.
        problem: Its problem.
        recipe: The run's.
        device: Where the network is.
        stay: Whether the new ones stay, as there is no more training.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    with preserved(device), autocast(recipe, device), problem.source.calling(NETWORK):
        refresh(model, network, statistics_inputs(problem))
    try:
        yield
    finally:
        if not stay:
            for buffer, own in zip(model.buffers(), before, strict=True):
                buffer.detach().copy_(own)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    test: Feed,
    recipe: Recipe,
    *,
    layout: torch.memory_format | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Returns the plain cross entropy and the accuracy, a share of 1, on the test set.

    Where a sample's logits are not numbers, or the largest is not finite, nothing is predicted, so it is not right.

    Args:
        network: The network, on the device of ``test``; it is in evaluation mode afterwards.
        test: Gives the test set.
        recipe: Says how large batches are, in which precision, and with how many workers.
        layout: In which order the network takes images.
        change: Makes of a batch of inputs those that the network gets. None: it gets them as they are.
    """
    network.eval()
    problem, totals = test.problem, torch.zeros(2, device=test.device)
    size = test.evaluated_at_a_time(recipe.batch_size)
    for x, y in test.without_index(make_loader(test.dataset, size, workers=recipe.workers)):
        x = in_layout(x if change is None else change(x), layout)
        with autocast(recipe, test.device):
            logits = logits_of(problem, network, x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        right = (logits.argmax(dim=1) == y) & logits.amax(dim=1).isfinite()  # argmax gives NaN a class too
        totals += torch.stack([loss, right.sum()])
    loss_mean, accuracy = (_distributed.total(totals) / size_of(problem.test)).tolist()
    return loss_mean, accuracy
