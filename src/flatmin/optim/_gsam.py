"""GSAM: SAM that also closes the gap between the loss at the worst point nearby and that at the weights.

*Surrogate Gap Minimization Improves Sharpness-Aware Training*, Zhuang et al., ICLR 2022, arXiv 2203.08065::

    g~ = gradient at w + e,   e as in SAM
    g_perp = g - (g . g~ / |g~|^2) g~          one projection over all parameters
    w = base step from w with g~ - alpha * g_perp
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import add_, clones, component
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import TwoPasses


def decompose_(second: list[Tensor], first: list[Tensor], alpha: float, norm: float, other: float) -> None:
    """Subtracts from ``second``, in place, ``alpha`` times the part of ``first`` that is orthogonal to it.

    Args:
        second: The gradients at the perturbed weights.
        first: Those at the weights; that part is made of them in place.
        alpha: Its weight.
        norm: The norm of ``first``.
        other: The norm of ``second``.
    """
    if other > 0:
        add_(first, second, alpha=-component(first, second, norm, other))
        add_(second, first, alpha=-alpha)


class GSAM(SharpnessAware):
    """SAM less ``alpha`` times the part of the first gradient that is orthogonal to the second: two passes a step.

    Memory: one copy of the weights and one of the first gradient. The first gradient goes into the step, so that under
    ``DistributedDataParallel`` it is always that of the whole batch; the authors' code decomposes on each rank and
    averages then. Like the rule, and like pytorch-optimizer's, the projection is one over all parameters.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation, > 0. The paper's falls with the learning rate, from .04 to .02 for ResNets
            and .6 to .1 for ViT-B/32: ``flatmin.optim.RhoByLR(0.04, 0.02, lr_max=0.1)``.
        alpha: Weight of the orthogonal part, >= 0: .01 for ResNets, .6 for ViT-B/32.
        **common: What all two-pass methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``, ``when``,
            ``model``, ``same_randomness``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.GSAM(base, rho=flatmin.optim.RhoByLR(0.04, 0.02, lr_max=0.1), alpha=0.01)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.04,
        alpha: float = 0.01,
        **common: Unpack[TwoPasses],
    ) -> None:
        self.alpha = check_number("alpha", alpha, least=0)
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.first()
        if step.pays:
            parameters, first = step.parameters, clones(step.gradients)
            yield from step.second()
            first, norm = step.beside(parameters, first)
            decompose_(step.gradients, first, self.alpha, norm, step.norm)
