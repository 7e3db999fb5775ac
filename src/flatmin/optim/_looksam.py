"""LookSAM: what SAM adds to the gradient changes slowly, so that it need not be found anew each step.

*Towards Efficient and Scalable Sharpness-Aware Minimization*, Liu et al., CVPR 2022, arXiv 2203.02714::

    every k-th step:   g~ = gradient at w + e, e as in SAM
                       g_v = g~ - (g~ . g / |g|^2) g          one projection over all parameters
                       w = base step from w with g~
    the others:        w = base step from w with g + alpha * |g| / (|g_v| + 1e-8) * g_v
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import add_, clones, component, global_norm, plus
from ._perturbation import Rho
from ._step import Passes, Step, aligned
from .schedules import Every

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import TwoPasses


def orthogonal(first: list[Tensor], second: list[Tensor], norm: float, other: float) -> list[Tensor]:
    """The part of ``second``, whose norm is ``other``, that is orthogonal to ``first``, whose norm is ``norm``."""
    return plus(second, first, alpha=-component(second, first, other, norm))


def reuse_(gradients: list[Tensor], directions: list[Tensor], alpha: float, norm: float) -> None:
    """Adds to ``gradients``, in place, ``directions`` brought to ``alpha`` times the length ``norm``."""
    add_(gradients, directions, alpha=alpha * norm / (float(global_norm(directions)) + 1e-8))


class LookSAM(SharpnessAware):
    """SAM every ``k`` steps; in the others one pass, to whose gradient is added what the last second pass brought.

    The closure is called ``(k + 1) / k`` times a step on average. Memory: one buffer of the weights' size, and in the
    steps with a second pass one copy of the weights and one of the first gradient. The first gradient goes into what is
    kept, so that under ``DistributedDataParallel`` it is always that of the whole batch. The projection is one over all
    parameters, as in the paper's algebra; pytorch-optimizer projects each tensor by itself.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation, > 0, or a function of the base optimizer to it. SAM's.
        k: Steps from one second pass to the next; the paper's for ViT is 5. ``when`` takes its place.
        alpha: Weight of what is reused, >= 0, .2 to .7 in the paper.
        **common: What all two-pass methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``, ``when``,
            ``model``, ``same_randomness``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.AdamW(torch.nn.Linear(4, 3).parameters())
        >>> optimizer = flatmin.LookSAM(base, rho=0.05, k=5, alpha=0.7)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        **common: Unpack[TwoPasses],
    ) -> None:
        self.alpha = check_number("alpha", alpha, least=0)
        if common.get("when") is None:
            common["when"] = Every(k)
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.first()
        if step.pays:
            parameters, first = step.parameters, clones(step.gradients)
            yield from step.second()
            first, norm = step.beside(parameters, first)
            self._memory.replace("direction", step.parameters, orthogonal(first, step.gradients, norm, step.norm))
        elif step.rho > 0:
            known, directions = self._memory.known("direction", step.parameters)
            if known:
                reuse_(aligned(known, step.parameters, step.gradients), directions, self.alpha, step.norm)
