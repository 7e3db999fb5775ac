"""GSAM: SAM that also closes the gap between the loss at the worst point nearby and that at the weights.

*Surrogate Gap Minimization Improves Sharpness-Aware Training*, Zhuang et al., ICLR 2022, arXiv 2203.08065::

    g~ = gradient at w + e,   e as in SAM
    g_perp = g - (g . g~ / |g~|^2) g~          one projection over all parameters
    w = base step from w with g~ - alpha * g_perp
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._scaling import Rho, Scaling
from ._step import Step, aligned
from ._tensors import add_, clones, cosine, global_norm, scale_
from ._when import When


def decompose_(second: list[Tensor], first: list[Tensor], alpha: float) -> None:
    """Subtracts from ``second``, in place, ``alpha`` times the part of ``first`` that is orthogonal to it."""
    norm, other = float(global_norm(first)), float(global_norm(second))
    if other > 0:
        scale_(second, 1 + alpha * cosine(first, second, norm, other) * norm / other)
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
        parameters: Those to perturb; all by default. The projection is over all in any case.
        scaling: What makes the perturbation of the gradient; one norm over all by default.
        when: Which steps pay for the second pass; all by default.
        model: The network; seldom needed, see `SharpnessAware`.

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
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        when: When | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.alpha = check_number("alpha", alpha, least=0)
        super().__init__(base_optimizer, rho=rho, parameters=parameters, scaling=scaling, when=when, model=model)

    def _gradient(self, step: Step) -> None:
        step.first()
        if step.pays:
            parameters, first = step.parameters, clones(step.gradients)
            step.second()
            decompose_(step.gradients, aligned(step.parameters, parameters, first), self.alpha)
