"""The largest eigenvalues of the loss's Hessian, by Lanczos, and its trace, by Hutchinson's estimate.

Both need products ``H v`` only, each the price of about two passes (Pearlmutter 1994). ARPACK, through scipy, makes the
Lanczos iteration; the trace is the mean of ``v H v`` over random vectors of signs (Hutchinson 1990).
"""

from dataclasses import dataclass
from typing import Any

import torch

from .._checks import Bounds, check_integer, check_number
from ..errors import FlatminError, InvalidArgumentError, require
from ._objective import Objective, measure
from ._result import Result
from ._sam import mean_and_error

TOGETHER = 8  # vectors that share a pass forward and the first one back


@dataclass(frozen=True)
class HessianEigenvalues(Result):
    """What `hessian_eigenvalues` returns.

    Attributes:
        value: The largest.
        eigenvalues: The ``k`` largest, from the largest down.
        products: Products with the Hessian that it took.
        samples: How many were measured on.
        normalise_logits: As given.
    """

    value: float
    eigenvalues: tuple[float, ...]
    products: int
    samples: int
    normalise_logits: bool


@dataclass(frozen=True)
class HessianTrace(Result):
    """What `hessian_trace` returns.

    Attributes:
        value: The estimate.
        standard_error: Of ``value``, from the vectors that were drawn.
        parameters: Number of eigenvalues, of which the trace is the sum.
        samples: How many were measured on.
        probes: As given.
        normalise_logits: As given.
    """

    value: float
    standard_error: float
    parameters: int
    samples: int
    probes: int
    normalise_logits: bool


@measure
def hessian_eigenvalues(
    objective: Objective, *, k: int = 1, tolerance: float = 1e-4, vectors: int | None = None
) -> HessianEigenvalues:
    """The ``k`` largest eigenvalues of the mean loss's Hessian, positive ones first, by Lanczos (ARPACK).

    Needs scipy. Keeps ``vectors`` of the weights' size in main memory, and takes a few more products with the Hessian
    than that, each the price of two passes and more, five with convolutions on a CPU (Pearlmutter 1994).

    Args:
        objective: What to measure. Its seed draws the vector that the iteration starts from.
        k: How many, fewer than there are weights.
        tolerance: Relative error that is allowed, > 0; less than 1e-6 needs an objective of ``dtype=torch.float64``.
        vectors: How many the iteration keeps, more than ``k``. None: ``max(2 k + 1, 20)``. Fewer are cheaper if the
            tolerance is wide.

    Returns:
        The largest as ``value``, and all ``k``.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.
        FlatminError: If the iteration does not converge.
        MissingDependencyError: If scipy is not installed.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> objective = Objective(model, torch.nn.functional.mse_loss, batches)  # (4 w1^2 + w2^2) / 2
        >>> round(hessian_eigenvalues(objective).value, 4)
        4.0
    """
    check_integer("k", k, least=1)
    check_number("tolerance", tolerance, above=0)
    vectors = None if vectors is None else check_integer("vectors", vectors, least=1)
    linalg = require("scipy.sparse.linalg", install="flatmin[cli]")
    with objective._snapshot() as loss:
        size, products, largest = len(loss.weights), 0, 0.0
        if k >= size:
            raise InvalidArgumentError(f"k must be less than the number of weights, {size}, got {k}")
        loss.gradient(loss.weights)  # raises where nothing can be measured

        def product(vector: Any) -> Any:
            nonlocal products, largest
            products += 1
            v = torch.from_numpy(vector.reshape(1, -1).copy()).to(loss.device, loss.dtype)
            found = loss.hessian_product(v)[0]
            largest = max(largest, float(found.abs().max()))
            return found.cpu().numpy()

        if vectors is not None and vectors <= k:
            raise InvalidArgumentError(f"vectors must be more than k, {k}, got {vectors}")
        kept = None if vectors is None else min(vectors, size)
        start = torch.randn(size, generator=torch.Generator().manual_seed(objective.seed), dtype=loss.dtype).numpy()
        operator = linalg.LinearOperator((size, size), matvec=product, dtype=start.dtype)
        try:
            found = linalg.eigsh(operator, k, which="LA", v0=start, ncv=kept, tol=tolerance, return_eigenvectors=False)
        except linalg.ArpackNoConvergence as error:
            raise FlatminError(
                f"Lanczos found {len(error.eigenvalues)} of {k} eigenvalues in {products} products; "
                "allow a larger tolerance, or make the Objective with dtype=torch.float64"
            ) from error
        except linalg.ArpackError as error:
            if largest > 0:
                raise FlatminError(
                    f"Lanczos gave up after {products} products ({error}); make the Objective with "
                    "dtype=torch.float64, or with another seed"
                ) from error
            found = [0.0] * k  # a random vector is mapped to 0, so all are; ARPACK takes no such matrix
        values = tuple(sorted(map(float, found), reverse=True))
        return HessianEigenvalues(values[0], values, products, loss.samples, objective.normalise_logits)


@measure
def hessian_trace(objective: Objective, *, probes: int = 32) -> HessianTrace:
    """The trace of the mean loss's Hessian, by Hutchinson's estimate, with its standard error.

    The mean of ``v^T H v`` over random vectors ``v`` of signs (Hutchinson 1990).

    Args:
        objective: What to measure. Its seed draws the vectors.
        probes: Random vectors, 2 or more, a product with the Hessian each; the error falls with their square root.

    Returns:
        The estimate as ``value``, with its standard error.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> objective = Objective(model, torch.nn.functional.mse_loss, batches)  # (4 w1^2 + w2^2) / 2
        >>> hessian_trace(objective).value  # exact, since the Hessian is diagonal
        5.0
    """
    Bounds(integer=True, least=2).check("probes", probes)
    with objective._snapshot() as loss:
        size = len(loss.weights)
        loss.gradient(loss.weights)  # raises where nothing can be measured
        generator, values = torch.Generator().manual_seed(objective.seed), []
        for start in range(0, probes, TOGETHER):
            signs = torch.randint(2, (min(TOGETHER, probes - start), size), generator=generator)
            vectors = (2 * signs - 1).to(loss.device, loss.dtype)
            values += (vectors * loss.hessian_product(vectors)).sum(dim=1).tolist()
        value, error = mean_and_error(values)
        return HessianTrace(value, error, size, loss.samples, probes, objective.normalise_logits)
