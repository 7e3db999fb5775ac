"""S2-SAM: SAM at the price of the base optimizer, perturbed along the gradient of the step before.

*A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse Training*,
Ji et al., NeurIPS 2024::

    e = rho * g' / (|g'| + 1e-12)     g' the gradient with which the step before was made
    w = base step from w with the gradient at w + e
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ._base import SharpnessAware
from ._foreach import clones
from ._options import OnePass
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class S2SAM(SharpnessAware):
    """Steps with the gradient taken ``rho`` up the slope of the step before: one pass a step.

    The opposite sign to `MSAM`. The first step is the base optimizer's. Memory: one copy of the weights during the
    pass, and the gradient of the step before, of the perturbed parameters.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation, > 0, or a function of the base optimizer to it.
        **common: What all methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.S2SAM(base, rho=0.05)
    """

    _common, _most_passes = OnePass, 1

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.05,
        **common: Unpack[OnePass],
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.only(*self._memory.known("gradient", step.candidates()))
        parameters, gradients = step.perturbed()
        self._memory.replace("gradient", parameters, clones(gradients))
