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
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import Bounds, check_flag
from ._batches import Batch
from ._objective import Objective, measure
from ._result import Result
from ._snapshot import Snapshot, check_finite


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


@measure
def sam_sharpness(
    objective: Objective,
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
    ascent_steps: int = 1,
    per_batch: bool = False,
) -> SamSharpness:
    """By how much the loss rises at the end of a step of length ``rho`` up its gradient: SAM's sharpness.

    ``R(w) = L(w + e) - L(w)`` with ``e = rho * g / (|g| + 1e-12)`` (Du et al. 2022, arXiv 2205.14083, equations 3 and
    4). Costs a pass and a forward pass over the batches, and a pass more for each further ascent step.

    Args:
        objective: What to measure.
        rho: Length of the step, > 0.
        adaptive: Measure the step relative to each weight, as ASAM does (Kwon et al. 2021, arXiv 2102.11600).
            Rescaling a layer, which does not change a ReLU network's output, then changes little. Use about ten times
            the rho.
        eta: What ASAM adds to the absolute weights, >= 0.
        ascent_steps: Number of gradients followed, each taken at the end of the step before; the highest loss counts.
            More come nearer to the worst case within the ball.
        per_batch: Each batch goes up its own gradient, and the mean is returned: m-sharpness, which SAM trains against.

    Returns:
        The rise as ``value``, with the loss and the gradient's norm at the model's weights.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss is infinite or not a number.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> objective = Objective(model, torch.nn.functional.mse_loss, [(torch.ones(2, 1), torch.ones(2, 1))])
        >>> sam_sharpness(objective, rho=0.5).value  # (3.5 - 1)^2 - (3 - 1)^2
        2.25
    """
    rho = Bounds(above=0).check("rho", rho)
    Bounds(least=0).check("eta", eta)
    Bounds(integer=True, least=1).check("ascent_steps", ascent_steps)
    adaptive, per_batch = check_flag("adaptive", adaptive), check_flag("per_batch", per_batch)
    with objective._snapshot() as loss:
        scales = loss.scales(eta) if adaptive else None
        sums, total = [0.0, 0.0, 0.0], loss.total()
        for part in ([batch] for batch in loss.batches) if per_batch else (None,):
            if count := total if part is None else loss.count(part[0][1]):
                for place, value in enumerate(_climb(loss, part, rho, scales, ascent_steps)):
                    sums[place] += value * count / total
        value, at, norm = sums
        return SamSharpness(
            value, at, norm, loss.samples, rho, adaptive, ascent_steps, per_batch, objective.normalise_logits
        )


def _climb(
    loss: Snapshot, batches: list[Batch] | None, rho: float, scales: Tensor | None, steps: int
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


@measure
def average_sharpness(
    objective: Objective,
    *,
    rho: float = 0.05,
    adaptive: bool = True,
    eta: float = 0.01,
    directions: int = 16,
) -> AverageSharpness:
    """By how much the loss rises on average if every weight moves at random, by some share of its size.

    ``R(w) = E L(w + rho * T z) - L(w)`` with ``z ~ N(0, 1)`` for each weight (Andriushchenko et al. 2023, arXiv
    2302.07011). Each direction is followed both ways, so the slope, whose mean is 0, adds no noise. Costs a forward
    pass over the batches, and two for each direction.

    Args:
        objective: What to measure. Its seed draws the directions.
        rho: Standard deviation of each weight's move, > 0. Unlike SAM's it is not the length of all moves together,
            which is about ``rho * sqrt(n)`` for ``n`` weights.
        adaptive: Measure the moves relative to each weight: ``T`` is ASAM's, else 1.
        eta: What ASAM adds to the absolute weights, >= 0.
        directions: Number of directions, 2 or more.

    Returns:
        The mean rise as ``value``, with its standard error.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss is infinite or not a number.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = Objective(model, torch.nn.functional.cross_entropy, [(torch.ones(2, 4), torch.tensor([0, 1]))])
        >>> average_sharpness(objective, directions=4).directions
        4
    """
    rho = Bounds(above=0).check("rho", rho)
    Bounds(least=0).check("eta", eta)
    Bounds(integer=True, least=2).check("directions", directions)
    adaptive = check_flag("adaptive", adaptive)
    with objective._snapshot() as loss:
        loss.check_changes()
        scales = loss.scales(eta) if adaptive else torch.ones_like(loss.weights)
        start = check_finite("the loss", loss.loss(loss.weights))
        generator, rises = torch.Generator().manual_seed(objective.seed), []
        for _ in range(directions):
            z = torch.randn(len(scales), generator=generator, dtype=loss.dtype).to(loss.device)
            ends = [loss.loss(torch.addcmul(loss.weights, scales, z, value=sign * rho)) for sign in (1, -1)]
            rises.append(check_finite("the loss of a perturbed model", sum(ends)) / 2 - start)
        value, error = mean_and_error(rises)
        return AverageSharpness(
            value, error, start, loss.samples, rho, adaptive, directions, objective.normalise_logits
        )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of independent draws, and its standard error."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
