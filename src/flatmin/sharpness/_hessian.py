"""The largest eigenvalues of the loss's Hessian, by Lanczos, and its trace, by Hutchinson's estimate.

Both need products ``H v`` only, each the price of about two passes (Pearlmutter 1994). ARPACK, through scipy, makes the
Lanczos iteration; the trace is the mean of ``v H v`` over random vectors of signs (Hutchinson 1990).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._checks import check_integer, check_number
from ..errors import FlatminError, InvalidArgumentError, require
from ._objective import Loss, objective
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


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    k: int = 1,
    tolerance: float = 1e-4,
    vectors: int | None = None,
    normalise_logits: bool = False,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> HessianEigenvalues:
    """The ``k`` largest eigenvalues of the mean loss's Hessian, positive ones first.

    Needs scipy. Keeps ``vectors`` of the weights' size in main memory, and takes a few more products with the Hessian
    than that.

    Args:
        model: The network; left as it is, whatever happens.
        loss_fn: ``loss_fn(model(x), y)`` is the mean over the batch.
        batches: Pairs ``(x, y)``, to be gone through several times.
        k: How many, fewer than there are weights.
        tolerance: Relative error that is allowed, > 0; less than 1e-6 needs ``dtype=torch.float64``.
        vectors: How many the iteration keeps, more than ``k``; ``max(2 k + 1, 20)`` if None. Fewer are cheaper where
            the tolerance is wide.
        normalise_logits: See `flatmin.sharpness`, as for the others.
        batch_statistics: Likewise.
        dtype: Likewise.
        samples: Likewise.
        seed: Likewise; draws the vector that the iteration starts from.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.
        FlatminError: If the iteration does not come to an end.
        MissingDependencyError: If scipy is not installed.
    """
    check_integer("k", k, least=1)
    check_number("tolerance", tolerance, above=0)
    linalg = require("scipy.sparse.linalg", install="flatmin[cli]")
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
        size, products = len(loss.weights), 0
        if k >= size:
            raise InvalidArgumentError(f"k must be less than the number of weights, {size}, got {k}")
        loss.gradient(loss.weights)  # raises where nothing can be measured

        def product(vector: Any) -> Any:
            nonlocal products
            products += 1
            v = torch.from_numpy(vector.reshape(1, -1).copy()).to(loss.device, loss.dtype)
            return loss.hessian_product(v)[0].cpu().numpy()

        if vectors is not None and vectors <= k:
            raise InvalidArgumentError(f"vectors must be more than k, {k}, got {vectors}")
        kept = None if vectors is None else min(vectors, size)
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=loss.dtype).numpy()
        operator = linalg.LinearOperator((size, size), matvec=product, dtype=start.dtype)
        try:
            found = linalg.eigsh(operator, k, which="LA", v0=start, ncv=kept, tol=tolerance, return_eigenvectors=False)
        except linalg.ArpackNoConvergence as error:
            raise FlatminError(
                f"Lanczos found {len(error.eigenvalues)} of {k} eigenvalues in {products} products; "
                "allow a larger tolerance, or take dtype=torch.float64"
            ) from error
        values = tuple(sorted(map(float, found), reverse=True))
        return HessianEigenvalues(values[0], values, products, loss.samples, normalise_logits)


def hessian_trace(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    probes: int = 32,
    normalise_logits: bool = False,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> HessianTrace:
    """The trace of the mean loss's Hessian, estimated, with its standard error.

    Args:
        model: The network; left as it is, whatever happens.
        loss_fn: ``loss_fn(model(x), y)`` is the mean over the batch.
        batches: Pairs ``(x, y)``, to be gone through several times.
        probes: Random vectors, 2 or more, a product with the Hessian each; the error falls with their square root.
        normalise_logits: See `flatmin.sharpness`, as for the others.
        batch_statistics: Likewise.
        dtype: Likewise.
        samples: Likewise.
        seed: Likewise; draws the vectors too.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.
    """
    check_integer("probes", probes, least=2)
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
        size = len(loss.weights)
        loss.gradient(loss.weights)  # raises where nothing can be measured
        generator, values = torch.Generator().manual_seed(seed), []
        for start in range(0, probes, TOGETHER):
            signs = torch.randint(2, (min(TOGETHER, probes - start), size), generator=generator)
            vectors = (2 * signs - 1).to(loss.device, loss.dtype)
            values += (vectors * loss.hessian_product(vectors)).sum(dim=1).tolist()
        value, error = mean_and_error(values)
        return HessianTrace(value, error, size, loss.samples, probes, normalise_logits)
