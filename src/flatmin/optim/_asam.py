"""ASAM: SAM in a neighbourhood that does not change when a layer is rescaled.

*ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks*, Kwon et al.,
ICML 2021, arXiv 2102.11600::

    e = rho * T^2 g / (|T g| + 1e-16)     T = |w| + eta for weights, 1 for biases
    w = base step from w with the gradient at w + e
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._options import EachRank
from ._perturbation import Elementwise, Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        **common: What all two-pass methods take, but for ``scaling``: ``parameters``, ``scaler``, ``max_norm``,
            ``when``, ``model``, ``same_randomness``; and ``norm``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, eta=0.01)
    """

    _common = EachRank

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.5,
        eta: float = 0.01,
        **common: Unpack[EachRank],
    ) -> None:
        if "scaling" in common:
            raise InvalidArgumentError("ASAM has its own scaling; give another to SAM(..., scaling=...)")
        common["scaling"] = Elementwise(eta)
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        yield from step.first()
        if step.pays:
            yield from step.second(eps=1e-16)
