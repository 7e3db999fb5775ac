"""SAM: the gradient at the worst point nearby.

*Sharpness-Aware Minimization for Efficiently Improving Generalization*, Foret et al., ICLR 2021, arXiv 2010.01412::

    e = rho * g / (|g| + 1e-12)     g the gradient at w, |g| its norm over all parameters
    w = base step from w with the gradient at w + e
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ._base import SharpnessAware
from ._options import EachRank
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SAM(SharpnessAware):
    """Steps with the gradient taken ``rho`` up the slope: two passes a step, and one copy of the weights.

    Everything else (what is shared with the base optimizer, batch-norm statistics, gradients that are not finite, each
    argument at length) is said in `SharpnessAware`.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation over all parameters together, > 0, or a function of the base optimizer to it.
        **common: What all two-pass methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``, ``when``,
            ``model``, ``same_randomness``; and ``norm``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> bool(optimizer.step(closure) < first)
        True
    """

    _common = EachRank

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.05,
        **common: Unpack[EachRank],
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.first()
        if step.pays:
            yield from step.second()
