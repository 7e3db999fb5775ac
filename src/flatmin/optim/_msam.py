"""MSAM: SAM at the price of the base optimizer, perturbed along its momentum.

*Momentum-SAM: Sharpness Aware Minimization without Computational Overhead*, Becker et al. 2024, arXiv 2401.12033::

    e = -rho * v / (|v| + 1e-12)     v the base optimizer's momentum
    w = base step from w with the gradient at w + e
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._options import OnePass
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

NAMES = ("momentum_buffer", "exp_avg")  # what torch's optimizers, and those that follow them, call their momentum


def momenta(parameters: list[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of ``parameters`` whose momentum is in an optimizer's ``state``, and it."""
    known, found = [], []
    for parameter in parameters:
        entries = state.get(parameter, {})
        momentum = next((entries[name] for name in NAMES if entries.get(name) is not None), None)
        if momentum is not None:
            known.append(parameter)
            found.append(momentum)
    return known, found


class MSAM(SharpnessAware):
    """Steps with the gradient taken ``rho`` ahead along the momentum: one pass a step.

    The momentum points up the slope of the past batches, so that the weights are moved *down* it, to where the base
    optimizer is about to go; the other sign was reported to fail. The first step, before there is a momentum, is the
    base optimizer's. Memory: one copy of the weights.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step; one that keeps ``momentum_buffer`` or
            ``exp_avg``: SGD with momentum, the Adam family, RMSprop with momentum.
        rho: Length of the perturbation, > 0, or a function of the base optimizer to it, 0 while ViTs warm up. Larger
            than SAM's: about 3 on CIFAR-100.
        **common: What all methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used; in the second step if the base optimizer
            keeps no momentum.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.MSAM(base, rho=3.0)
    """

    _common, _most_passes = OnePass, 1

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 3.0,
        **common: Unpack[OnePass],
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        state = self.base_optimizer.state
        known, found = momenta(step.candidates(), state)
        if step.number > 0 and not found and not momenta(list(state), state)[0]:
            raise InvalidArgumentError(
                f"base_optimizer {type(self.base_optimizer).__name__} keeps none of {', '.join(NAMES)}, along which "
                "MSAM perturbs; give SGD a momentum, or use S2SAM"
            )
        yield from step.only(known, found, sign=-1)
