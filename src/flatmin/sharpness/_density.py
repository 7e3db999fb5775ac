"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

*An Investigation into Neural Net Optimization via Hessian Eigenvalue Density*, Ghorbani et al., ICML 2019, arXiv
1901.10159. For a random unit vector, ``m`` steps of Lanczos give a tridiagonal matrix whose eigenvalues ``l_i``, with
the squared first components ``w_i`` of its eigenvectors, are the nodes and weights of a Gaussian quadrature::

    density(t) = mean over the vectors of sum_i w_i N(t; l_i, width^2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import Bounds
from ._objective import Objective, measure
from ._result import Result

MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class SpectralDensity(Result):
    """What `spectral_density` returns.

    Attributes:
        grid: Eigenvalues, evenly spaced.
        density: At these; it integrates to 1 over the grid.
        largest: The largest node, close to the largest eigenvalue.
        smallest: The smallest node, close to the smallest.
        width: Of the Gaussian that each node became, in units of the eigenvalues.
        samples: How many were measured on.
        normalise_logits: As given.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    largest: float
    smallest: float
    width: float
    samples: int
    normalise_logits: bool


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation: the nodes and weights of the quadrature that ``start`` gives.

    Args:
        product: A symmetric matrix times a vector of shape (n,).
        start: Shape (n,), not 0.
        steps: At most ``n`` of them are made; fewer where what is left of the space is mapped into itself.

    Returns:
        Eigenvalues of the tridiagonal matrix, from the smallest up, and the squared first components of its
        eigenvectors, which add up to 1; both float64 on the CPU.
    """
    steps = min(steps, len(start))
    basis = start.new_empty(steps + 1, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        vector, known = product(basis[step]), basis[: step + 1]
        diagonal.append(float(vector @ basis[step]))
        for _ in range(2):  # the second time takes away what rounding has left
            vector = vector - known.T @ (known @ vector)
        length = float(vector.norm())
        # What is left is rounding: the space is exhausted.
        if length <= 10 * torch.finfo(start.dtype).eps * max(map(abs, (*diagonal, *beside))):
            break
        beside.append(length)
        basis[step + 1] = vector / length
    beside = beside[: len(diagonal) - 1]
    below = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(below, -1) + torch.diag(below, 1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2


@measure
def spectral_density(
    objective: Objective, *, probes: int = 4, steps: int = 64, points: int = 1001, width: float = 0.01
) -> SpectralDensity:
    """How the eigenvalues of the mean loss's Hessian are distributed (Ghorbani et al. 2019, arXiv 1901.10159).

    Takes ``probes * steps`` products with the Hessian and keeps ``steps`` vectors of the weights' size.

    Args:
        objective: What to measure. Its seed draws the vectors.
        probes: Random vectors that are averaged over.
        steps: Lanczos steps from each vector; more show more detail.
        points: Of the grid, 101 or more.
        width: Of the Gaussian that each node becomes, as a share of the range of the nodes, 0.01 or more.

    Returns:
        The density on a grid of eigenvalues, and the largest and smallest node.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> objective = Objective(model, torch.nn.functional.mse_loss, batches)  # (4 w1^2 + w2^2) / 2
        >>> found = spectral_density(objective)
        >>> round(found.smallest, 4), round(found.largest, 4)
        (1.0, 4.0)
    """
    Bounds(integer=True, least=1).check("probes", probes)
    Bounds(integer=True, least=2).check("steps", steps)
    Bounds(integer=True, least=101, most=MOST_POINTS).check("points", points)
    Bounds(least=0.01).check("width", width)
    with objective._snapshot() as loss:
        loss.gradient(loss.weights)  # raises where nothing can be measured
        generator = torch.Generator().manual_seed(objective.seed)
        found = []
        for _ in range(probes):
            start = torch.randn(len(loss.weights), generator=generator, dtype=loss.dtype).to(loss.device)
            found.append(lanczos(lambda v: loss.hessian_product(v[None])[0], start, steps))
        nodes, weights = (torch.cat(column) for column in zip(*found, strict=True))
        smallest, largest = float(nodes.min()), float(nodes.max())
        deviation = width * (largest - smallest) or width * max(abs(largest), 1.0)
        grid = torch.linspace(smallest - 5 * deviation, largest + 5 * deviation, points, dtype=torch.float64)
        bells = torch.exp(-0.5 * ((grid[:, None] - nodes) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
        density = bells @ weights / probes
        return SpectralDensity(
            tuple(grid.tolist()),
            tuple(density.tolist()),
            largest,
            smallest,
            deviation,
            loss.samples,
            objective.normalise_logits,
        )
