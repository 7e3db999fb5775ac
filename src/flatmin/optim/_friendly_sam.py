"""Friendly SAM: perturbs along what is peculiar to the batch, and not along the gradient of all of the data.

*Friendly Sharpness-Aware Minimization*, Li et al., CVPR 2024, arXiv 2403.12350::

    d = g - sigma * m,   then   m = lam * m + (1 - lam) * g        at first m = g, d = g
    e = rho * d / (|d| + 1e-12)
    w = base step from w with the gradient at w + e
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import blend, plus
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import TwoPasses


def friendly(
    gradients: list[Tensor], momenta: Sequence[Tensor | None], sigma: float, lam: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The directions and the new momenta; where there is no momentum yet, both are the gradient."""
    directions = list(gradients)
    updated = [g.clone() if m is None else m for g, m in zip(gradients, momenta, strict=True)]
    old = [number for number, momentum in enumerate(momenta) if momentum is not None]
    known, means = [gradients[number] for number in old], [updated[number] for number in old]
    moved = zip(old, plus(known, means, alpha=-sigma), blend(means, known, 1 - lam), strict=True)
    for number, direction, momentum in moved:
        directions[number], updated[number] = direction, momentum
    return directions, updated


class FriendlySAM(SharpnessAware):
    """SAM along the gradient less its own moving mean: two passes a step.

    Memory: one copy of the weights, the momenta, and their next values during the second pass. The momenta are those of
    the whole batch's gradient under ``DistributedDataParallel`` too; they move in the steps that pay for a second pass.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation, > 0, or a function of the base optimizer to it. The paper's is .2.
        sigma: Share of the moving mean that is taken off, >= 0; at 0 it is SAM.
        lam: Momentum of the moving mean, in [0, 1); .6 to .95 in the paper.
        **common: What all two-pass methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``, ``when``,
            ``model``, ``same_randomness``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.FriendlySAM(base, rho=0.2, sigma=1.0, lam=0.9)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.2,
        sigma: float = 1.0,
        lam: float = 0.9,
        **common: Unpack[TwoPasses],
    ) -> None:
        self.sigma = check_number("sigma", sigma, least=0)
        self.lam = check_number("lam", lam, least=0, below=1)
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.first()
        if step.pays:
            parameters, gradients = step.perturbed()
            old = self._memory.get("momentum", parameters)
            directions, momenta = friendly(gradients, old, self.sigma, self.lam)
            del gradients
            yield from step.second(parameters, directions)
            self._memory.put("momentum", parameters, momenta)
