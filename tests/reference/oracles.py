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


def norm(tensors: list[Tensor]) -> float:
    """The global L2 norm."""
    return math.sqrt(sum(value * value for tensor in tensors for value in tensor.flatten().tolist()))


def dot(left: list[Tensor], right: list[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


def moved(weights: list[Tensor], perturbation: list[Tensor]) -> list[Tensor]:
    return [w + e for w, e in zip(weights, perturbation, strict=True)]


def asam_gradient(weights: list[Tensor], gradient: Gradient, rho: float, eta: float) -> list[Tensor]:
    """Kwon 2021: T = |w| + eta for weights (here: of two dimensions), 1 for others; e = rho T^2 g / (|T g| + 1e-16)."""
    first = gradient(weights)
    factors = [w.abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in weights]
    length = norm([t * g for t, g in zip(factors, first, strict=True)])
    perturbation = [rho * t**2 * g / (length + 1e-16) for t, g in zip(factors, first, strict=True)]
    return gradient(moved(weights, perturbation))


def gsam_gradient(weights: list[Tensor], gradient: Gradient, rho: float, alpha: float) -> list[Tensor]:
    """Zhuang 2022: g~ - alpha * g_perp, g_perp = g - (g . g~ / |g~|^2) g~."""
    first = gradient(weights)
    second, _ = sam_gradient(weights, gradient, rho)
    share = dot(first, second) / norm(second) ** 2
    return [s - alpha * (f - share * s) for f, s in zip(first, second, strict=True)]


def gsam_rho(lr: float, rho_max: float, rho_min: float, lr_max: float, lr_min: float) -> float:
    return rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)


def looksam_gradient(
    weights: list[Tensor], gradient: Gradient, rho: float, alpha: float, direction: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Liu 2022: the gradient and g_v; with a ``direction`` g_v a step that reuses it, without one that finds it."""
    first = gradient(weights)
    if direction is not None:
        factor = alpha * norm(first) / (norm(direction) + 1e-8)
        return [g + factor * v for g, v in zip(first, direction, strict=True)], direction
    second, _ = sam_gradient(weights, gradient, rho)
    cosine = dot(first, second) / (norm(first) * norm(second))
    found = [s - norm(second) * cosine * f / norm(first) for f, s in zip(first, second, strict=True)]
    return second, found


def friendly_gradient(
    weights: list[Tensor], gradient: Gradient, rho: float, sigma: float, lam: float, mean: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Li 2024: the gradient and the new m. d = g - sigma * m, then m = lam * m + (1 - lam) * g; first both are g."""
    first = gradient(weights)
    directions = first if mean is None else [g - sigma * m for g, m in zip(first, mean, strict=True)]
    mean = first if mean is None else [lam * m + (1 - lam) * g for g, m in zip(first, mean, strict=True)]
    perturbation = [rho * d / (norm(directions) + 1e-12) for d in directions]
    return gradient(moved(weights, perturbation)), mean


def msam_gradient(
    weights: list[Tensor], gradient: Gradient, rho: float, velocities: list[Tensor] | None
) -> list[Tensor]:
    """Becker 2024: the gradient at w - rho * v / |v|; at w before there is a momentum."""
    if velocities is None:
        return gradient(weights)
    return gradient(moved(weights, [-rho * v / norm(velocities) for v in velocities]))


def s2sam_gradient(
    weights: list[Tensor], gradient: Gradient, rho: float, previous: list[Tensor] | None
) -> list[Tensor]:
    """Ji 2024: the gradient at w + rho * g' / |g'|, g' that of the step before; at w in the first."""
    if previous is None:
        return gradient(weights)
    return gradient(moved(weights, [rho * g / norm(previous) for g in previous]))


def adaptive_choices(norms: Sequence[float], steps: int, start: float, end: float, decay: float) -> list[bool]:
    """Jiang 2023: a second pass where |g|^2 >= mu + c_t * sigma of the moving statistics that include it."""
    mean, variance, choices = 0.0, 0.0, []
    for t, value in enumerate(norms):
        mean = decay * mean + (1 - decay) * value**2
        variance = decay * variance + (1 - decay) * (value**2 - mean) ** 2
        c = t / steps * end + (1 - t / steps) * start
        choices.append(value**2 >= mean + c * math.sqrt(variance))
    return choices


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


def esam_gradient(
    weights: list[Tensor],
    gradient_of: Callable[[Sequence[int]], Gradient],
    losses: Callable[[list[Tensor]], Sequence[float]],
    kept: Sequence[bool],
    *,
    rho: float,
    beta: float,
    gamma: float,
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Du 2022, with the tensors drawn beforehand: the gradient, the perturbation and the samples of the second pass."""
    before = losses(weights)
    first = gradient_of(range(len(before)))(weights)
    length = norm([g for g, keep in zip(first, kept, strict=True) if keep])
    perturbation = [
        rho / (beta * (length + 1e-7)) * g if keep else torch.zeros_like(g) for g, keep in zip(first, kept, strict=True)
    ]
    there = moved(weights, perturbation)
    rises = [a - b for a, b in zip(losses(there), before, strict=True)]
    order = sorted(range(len(rises)), key=lambda i: -rises[i])
    samples = order[: math.ceil(gamma * len(order))]
    return gradient_of(samples)(there), perturbation, samples


def online_smoothing_loss(
    logits: Sequence[Row], labels: Sequence[int], soft: Sequence[Row], coefficient: float
) -> float:
    """Zhang 2021: (1 - coefficient) * CE(y) + coefficient * CE(S_y), averaged over the batch."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        logs = [math.log(value) for value in softmax(row, 1.0)]
        total += (1 - coefficient) * -logs[label]
        total += coefficient * -sum(share * log for share, log in zip(soft[label], logs, strict=True))
    return total / len(labels)


def online_soft_labels(
    batches: Iterable[tuple[Sequence[Row], Sequence[int]]], soft: Sequence[Row]
) -> list[list[float]]:
    """Zhang 2021: for each class the mean of the probabilities of its samples that were classified rightly."""
    said: list[list[list[float]]] = [[] for _ in soft]
    for logits, labels in batches:
        for row, label in zip(logits, labels, strict=True):
            if max(range(len(row)), key=lambda c: row[c]) == label:
                said[label].append(softmax(row, 1.0))
    return [
        [sum(rows[c] for rows in each) / len(each) for c in range(len(old))] if each else list(old)
        for each, old in zip(said, soft, strict=True)
    ]
