"""The paper's equations and the published update rules, transcribed slowly in float64.

Written from shared/reference (the paper, arXiv 2205.14083, and update-rules.md) and not from flatmin. Numbers are
Python floats where that is bearable. Epochs count from 0.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Row = Sequence[float]


def softmax(row: Row, temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    exponentials = [math.exp(value - max(scaled)) for value in scaled]
    return [value / sum(exponentials) for value in exponentials]


def kl(past: Row, now: Row, temperature: float) -> float:
    """KL(softmax(past / tau) || softmax(now / tau)), the past being the target."""
    p, q = softmax(past, temperature), softmax(now, temperature)
    return sum(p[c] * (math.log(p[c]) - math.log(q[c])) for c in range(len(p)))


def kl_gradient(past: Row, now: Row, temperature: float) -> list[float]:
    """Derivative of `kl` after ``now``: (q - p) / tau."""
    p, q = softmax(past, temperature), softmax(now, temperature)
    return [(q[c] - p[c]) / temperature for c in range(len(p))]


def trajectory(
    targets: Sequence[Row | None], logits: Sequence[Row], *, coefficient: float, temperature: float
) -> tuple[float, list[list[float]]]:
    """Equations 8 and 12 with distillation's tau**2: the loss and its gradient after the logits.

    A target that is None belongs to a sample that contributes nothing; the mean is over the whole batch.
    """
    scale = coefficient * temperature**2 / len(logits)
    loss, gradient = 0.0, []
    for past, now in zip(targets, logits, strict=True):
        if past is None:
            gradient.append([0.0] * len(now))
        else:
            loss += scale * kl(past, now, temperature)
            gradient.append([scale * value for value in kl_gradient(past, now, temperature)])
    return loss, gradient


def saf(
    stream: Iterable[tuple[int, Sequence[int], Sequence[Row]]],
    *,
    coefficient: float,
    temperature: float,
    lag: int,
    start_epoch: int,
) -> list[tuple[float, list[list[float]]]]:
    """Algorithm 1 over a stream of (epoch, samples, logits): each batch's loss and gradient.

    Remembers every epoch of the run. A sample that an epoch brings twice contributes the first time.
    """
    outputs: dict[int, dict[int, Row]] = {}  # epoch -> sample -> logits
    results = []
    for epoch, samples, logits in stream:
        now = outputs.setdefault(epoch, {})
        targets: list[Row | None] = []
        for sample, row in zip(samples, logits, strict=True):
            repeated = sample in now
            past = outputs.get(epoch - lag, {}).get(sample)
            targets.append(None if repeated or epoch < start_epoch else past)
            now[sample] = row
        results.append(trajectory(targets, logits, coefficient=coefficient, temperature=temperature))
    return results


def ema(start: Tensor, values: Iterable[Tensor], decay: float) -> Tensor:
    """Equation 9: v_t = beta * v_(t-1) + (1 - beta) * theta_t, with v_0 = ``start``."""
    average = start.clone()
    for value in values:
        average = decay * average + (1 - decay) * value
    return average


Gradient = Callable[[list[Tensor]], list[Tensor]]


def sam_gradient(weights: list[Tensor], gradient: Gradient, rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Foret 2021: e = rho * g / (|g| + 1e-12), one norm over all parameters; (the gradient at w + e, e)."""
    first = gradient(weights)
    norm = math.sqrt(sum(value * value for tensor in first for value in tensor.flatten().tolist()))
    perturbation = [rho * tensor / (norm + 1e-12) for tensor in first]
    return gradient([w + e for w, e in zip(weights, perturbation, strict=True)]), perturbation


def sgd(
    weights: list[Tensor],
    velocities: list[Tensor],
    gradients: list[Tensor],
    *,
    lr: Sequence[float],
    momentum: float,
    weight_decay: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """One step of SGD, each parameter with its own lr and weight decay; velocities start at 0."""
    new_weights, new_velocities = [], []
    for i, weight in enumerate(weights):
        velocity = momentum * velocities[i] + gradients[i] + weight_decay[i] * weight
        new_velocities.append(velocity)
        new_weights.append(weight - lr[i] * velocity)
    return new_weights, new_velocities


def autograd(loss: Callable[[list[Tensor]], Tensor]) -> Gradient:
    """The gradient of a loss after a list of weights, by torch's autograd."""

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        return list(torch.autograd.grad(loss(leaves), leaves))

    return gradient
