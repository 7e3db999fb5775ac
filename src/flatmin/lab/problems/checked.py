"""What a problem's parts give during a run, checked as it comes: batches, logits, the criterion's loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidArgumentError
from .problem import Problem, class_numbers
from .source import CRITERION, NETWORK, SHIFT


def pair(problem: Problem, part: str, batch: Any) -> tuple[Tensor, Tensor]:
    """A batch of ``part`` as inputs and class indices, on the CPU.

    Raises:
        FlatminError: If it is something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        problem.source.refuse(f"a sample must be a pair (x, y) of a tensor and a class number; {part} has others")
    return batch[0], class_numbers(batch[1], problem.num_classes, problem.source.prefixed(part))


def logits_of(problem: Problem, network: nn.Module, x: Tensor) -> Tensor:
    """What a network of the problem makes of a batch.

    Raises:
        FlatminError: If it cannot take the batch, or returns something else than logits.
    """
    with problem.source.calling(NETWORK):
        logits: Any = network(x)
    wanted = (len(x), problem.num_classes)
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        name = NETWORK if problem.source.path else problem.source.name
        problem.source.refuse(f"{name} must return logits of shape (batch, classes), here {wanted}, got {got}")
    if torch.is_grad_enabled() and not logits.requires_grad:
        problem.source.refuse(f"{NETWORK} returned logits without a gradient, so it cannot be trained; detach none")
    return logits


def loss_of(problem: Problem, criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """What the criterion makes of logits in training.

    Raises:
        FlatminError: If it cannot take them, or returns something else than a loss that can be trained on.
    """
    with problem.source.calling(CRITERION):
        loss: Any = criterion(logits, y)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        got = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            got = f"one of shape {tuple(loss.shape)}" if loss.ndim else "one that does not follow from them, a constant"
        problem.source.refuse(
            f"{CRITERION} must return the mean loss of the batch, a tensor of shape () made from the logits, got {got}"
        )
    return loss


def shifted(problem: Problem, x: Tensor) -> Tensor:
    """A batch of inputs as the shifted set has them: by the experiment file's ``shift(x)``, or with its sign changed.

    Raises:
        FlatminError: If they have no sign, or the function returns something else.
    """
    if problem.shift is None:
        if not (x.is_floating_point() or x.is_complex()):
            raise InvalidArgumentError(
                f"after fine-tunes on inputs whose sign is changed, and these are {x.dtype}: define shift(x) in the "
                "experiment file, which makes a batch of a shifted set of it, or leave out after"
            )
        return -x
    with problem.source.calling(SHIFT):
        made: Any = problem.shift(x)
    if not isinstance(made, Tensor) or made.shape != x.shape:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        problem.source.refuse(f"{SHIFT} must return a batch of the same shape, {tuple(x.shape)}, got {got}")
    return made
