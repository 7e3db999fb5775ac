"""SAM's measure of sharpness, and its adaptive and average-case relatives.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083, equations 3 and 4::

    R(w) = L(w + e) - L(w),   e = rho * g / (|g| + 1e-12)

*ASAM*, Kwon et al. 2021, arXiv 2102.11600, measures the length of ``e`` relative to the weights::

    e = rho * T^2 g / (|T g| + 1e-12),   T = |w| + eta for weights, 1 for biases and normalisation layers

*A Modern Look at the Relationship between Sharpness and Generalization*, Andriushchenko et al., ICML 2023, arXiv
2302.07011, has the average case beside the worst::

    R(w) = E L(w + rho * T z) - L(w),   z ~ N(0, 1) for each weight
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number
from ._objective import Batch, Loss, Objective, check_finite, objective
from ._result import Result


@dataclass(frozen=True)
class SamSharpness(Result):
    """What `sam_sharpness` returns.

    Attributes:
        value: By how much the loss rises.
        loss: At the model's weights.
        gradient_norm: There; with ``per_batch`` the mean over the batches.
        samples: How many were measured on.
        rho: As given, as are the others.
    """

    value: float
    loss: float
    gradient_norm: float
    samples: int
    rho: float
    adaptive: bool
    ascent_steps: int
    per_batch: bool
    normalise_logits: bool


@dataclass(frozen=True)
class AverageSharpness(Result):
    """What `average_sharpness` returns.

    Attributes:
        value: By how much the loss rises on average.
        standard_error: Of ``value``, from the directions that were drawn.
        loss: At the model's weights.
        samples: How many were measured on.
        rho: As given, as are the others.
    """

    value: float
    standard_error: float
    loss: float
    samples: int
    rho: float
    adaptive: bool
    directions: int
    normalise_logits: bool


def sam_sharpness(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
    ascent_steps: int = 1,
    per_batch: bool = False,
    normalise_logits: bool = False,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> SamSharpness:
    """By how much the loss rises at the far end of a step of length ``rho`` up its gradient (equations 3 and 4).

    Costs two passes and a forward pass over the batches, and a pass and a forward pass for each further ascent step.

    Args:
        model: The network; left as it is, whatever happens. What it has in common with the other measures is
            described in `flatmin.sharpness`.
        loss_fn: ``loss_fn(model(x), y)`` is the mean over the batch.
        batches: Pairs ``(x, y)``, to be gone through several times.
        rho: Length of the step, > 0.
        adaptive: Whether it is measured relative to each weight, as ASAM does: rescaling a layer, which a ReLU network
            does not notice, then changes little. Take about ten times the rho.
        eta: What ASAM adds to the absolute weights, >= 0.
        ascent_steps: Gradients followed: each is taken at the far end of the one before, the worst end counts. That is
            the steepest ascent within the ball, and comes nearer to the worst case than one gradient does.
        per_batch: Whether each batch goes up its own gradient (m-sharpness, what SAM trains against); their mean.
        normalise_logits: See `flatmin.sharpness`, as for the others.
        batch_statistics: Likewise.
        dtype: Likewise.
        samples: Likewise.
        seed: Likewise.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss is infinite or not a number.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> found = sam_sharpness(model, torch.nn.functional.mse_loss, [(torch.ones(2, 1), torch.ones(2, 1))], rho=0.5)
        >>> found.value  # (3.5 - 1)^2 - (3 - 1)^2
        2.25
    """
    rho = check_number("rho", rho, above=0)
    check_number("eta", eta, least=0)
    check_integer("ascent_steps", ascent_steps, least=1)
    with objective(
        model,
        loss_fn,
        batches,
        normalise_logits=normalise_logits,
        batch_statistics=batch_statistics,
        dtype=dtype,
        samples=samples,
        seed=seed,
    ) as loss:
        scales = loss.scales(eta) if adaptive else None
        sums, parts = [0.0, 0.0, 0.0], [[batch] for batch in loss] if per_batch else [None]
        for part in parts:
            count = loss.samples if part is None else len(part[0][1])
            for place, value in enumerate(_climb(loss, part, rho, scales, ascent_steps)):
                sums[place] += value * count / loss.samples
        value, at, norm = sums
        return SamSharpness(value, at, norm, loss.samples, rho, adaptive, ascent_steps, per_batch, normalise_logits)


def _climb(
    loss: Objective, batches: list[Batch] | None, rho: float, scales: Tensor | None, steps: int
) -> tuple[float, float, float]:
    """Returns the rise of the loss over some batches, the loss and its gradient's norm."""
    start, gradient = loss.gradient(loss.weights, batches)
    norm, worst = float(gradient.norm()), -math.inf
    for step in range(steps):
        if scales is None:
            e = gradient * (rho / (float(gradient.norm()) + 1e-12))
        else:
            scaled = scales * gradient
            e = scales * scaled * (rho / (float(scaled.norm()) + 1e-12))
        there = loss.weights + e
        if step + 1 < steps:
            high, gradient = loss.gradient(there, batches)
        else:
            high = check_finite(f"the loss at a distance of {rho:g}", loss.loss(there, batches))
        worst = max(worst, high)
    return worst - start, start, norm


def average_sharpness(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    adaptive: bool = True,
    eta: float = 0.01,
    directions: int = 16,
    normalise_logits: bool = False,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> AverageSharpness:
    """By how much the loss rises on average where every weight is moved at random by some share of its size.

    Each direction is gone both ways, so that the slope, which averages to nothing, adds no noise. Costs a forward pass
    over the batches, and two for each direction.

    Args:
        model: The network; left as it is, whatever happens.
        loss_fn: ``loss_fn(model(x), y)`` is the mean over the batch.
        batches: Pairs ``(x, y)``, to be gone through several times.
        rho: Standard deviation of each weight's move, > 0. Unlike SAM's it is not the length of all moves together,
            which is about ``rho * sqrt(n)`` for ``n`` weights.
        adaptive: Whether it is measured relative to each weight.
        eta: What ASAM adds to the absolute weights, >= 0.
        directions: How many are drawn, 2 or more.
        normalise_logits: See `flatmin.sharpness`, as for the others.
        batch_statistics: Likewise.
        dtype: Likewise.
        samples: Likewise.
        seed: Likewise; draws the directions too.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss is infinite or not a number.
    """
    rho = check_number("rho", rho, above=0)
    check_number("eta", eta, least=0)
    check_integer("directions", directions, least=2)
    with objective(
        model,
        loss_fn,
        batches,
        normalise_logits=normalise_logits,
        batch_statistics=batch_statistics,
        dtype=dtype,
        samples=samples,
        seed=seed,
    ) as loss:
        scales = loss.scales(eta) if adaptive else torch.ones_like(loss.weights)
        start = check_finite("the loss", loss.loss(loss.weights))
        generator, rises = torch.Generator().manual_seed(seed), []
        for _ in range(directions):
            z = torch.randn(len(scales), generator=generator, dtype=loss.dtype).to(loss.device)
            ends = [loss.loss(torch.addcmul(loss.weights, scales, z, value=sign * rho)) for sign in (1, -1)]
            rises.append(check_finite("the loss of a perturbed model", sum(ends)) / 2 - start)
        value, error = mean_and_error(rises)
        return AverageSharpness(value, error, start, loss.samples, rho, adaptive, directions, normalise_logits)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of independent draws, and its standard error."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
