"""ASAM: SAM in a neighbourhood that does not change when a layer is rescaled.

*ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks*, Kwon et al.,
ICML 2021, arXiv 2102.11600::

    e = rho * T^2 g / (|T g| + 1e-16)     T = |w| + eta for weights, 1 for biases
    w = base step from w with the gradient at w + e
"""

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ._base import SharpnessAware
from ._scaling import Elementwise, Rho
from ._step import Step
from ._when import When


class ASAM(SharpnessAware):
    """Steps with the gradient taken up the slope, each weight moved in proportion to its square: two passes a step.

    It is ``SAM(..., scaling=Elementwise(eta))`` with its paper's defaults. `Elementwise` says what counts as a weight:
    tensors of two dimensions and more, where the authors' code goes by names, and takes normalisation layers' scales
    for weights too; pytorch-optimizer's ``adaptive=True`` takes every tensor, without eta. Memory: one copy of the
    weights, and two more for a moment before the second pass.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation, measured relative to the weights, > 0, or a function of the base optimizer to
            it. About ten times SAM's: .5 for CIFAR-10, 1 for CIFAR-100.
        eta: Added to the absolute weights, >= 0.
        parameters: Those to perturb; all by default.
        when: Which steps pay for the second pass; all by default.
        model: The network; seldom needed, see `SharpnessAware`.
        norm: Whose gradient makes the perturbation where several processes train together, see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, eta=0.01)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.5,
        eta: float = 0.01,
        parameters: Iterable[Tensor] | None = None,
        when: When | None = None,
        model: nn.Module | None = None,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            parameters=parameters,
            scaling=Elementwise(eta),
            when=when,
            model=model,
            norm=norm,
        )

    def _gradient(self, step: Step) -> None:
        step.first()
        if step.pays:
            step.second(eps=1e-16)
