"""ESAM: SAM that perturbs a part of the tensors, and takes the second gradient of a part of the samples.

*Efficient Sharpness-aware Minimization for Improved Training of Neural Networks*, Du et al., ICLR 2022,
arXiv 2110.03141::

    each tensor is kept with probability beta;   e = rho / beta * g_kept / (|g_kept| + 1e-7),   0 for the others
    s_i = l_i(w + e) - l_i(w)                    without gradient
    w = base step from w with the gradient at w + e, of the mean over the gamma * B samples of largest s_i
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_integer, check_number
from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._options import EachRank
from ._perturbation import Rho
from ._step import Passes, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

EVERY_SAMPLE = slice(None)


def most_risen(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """Numbers of the ``gamma * B`` samples, rounded up, whose loss has risen most."""
    return (after - before).topk(math.ceil(gamma * len(before))).indices


class ESAM(SharpnessAware):
    """SAM on random tensors and on the samples that suffer most: one pass, a forward, and ``gamma`` of a pass a step.

    The optimizer has to choose samples, which no closure of torch's lets it do. In its place `step` takes a function
    that gets ``keep``, which indexes the batch, and returns the loss of each sample kept, unreduced; it does neither
    ``zero_grad`` nor ``backward``, and leaves losses unscaled where there is a ``scaler``. It is called with the whole
    batch, again without gradient at the perturbed weights, and there with the samples chosen; once in steps that do not
    pay. The forward without gradient has the dropout masks of the first, so that losses rise by the weights alone.
    Batches cannot be accumulated. Memory: one copy of the tensors kept.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation were all tensors kept, > 0, or a function of the base optimizer to it. .05 to
            .2 in the paper.
        beta: Probability with which a tensor is perturbed, in (0, 1]. A step that keeps none is the base optimizer's.
        gamma: Share of the samples in the second pass, in (0, 1]; at 1 there is no forward to choose them.
        seed: Draws the tensors, from it and the step's number alone: the same on all ranks and after a resume.
        **common: What all two-pass methods take: ``parameters``, ``scaling``, ``scaler``, ``max_norm``, ``when``,
            ``model``, ``same_randomness``; and ``norm``; see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.ESAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, beta=0.6, gamma=0.5)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def losses(keep):
        ...     return torch.nn.functional.cross_entropy(model(x[keep]), y[keep], reduction="none")
        >>> first = optimizer.step(losses)
        >>> bool(optimizer.step(losses) < first)
        True
    """

    _closure = "def losses(keep): return criterion(model(x[keep]), y[keep], reduction='none')"
    _without_closure = ""
    _common = EachRank

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        **common: Unpack[EachRank],
    ) -> None:
        self.beta = check_number("beta", beta, above=0, most=1)
        self.gamma = check_number("gamma", gamma, above=0, most=1)
        self.seed = check_integer("seed", seed, least=0)
        super().__init__(base_optimizer, rho=rho, **common)

    def _gradient(self, step: Step) -> Passes:
        losses, before = step.closure, list[Tensor]()
        if losses is None:
            raise InvalidArgumentError(
                f"ESAM makes its passes itself, since it has to choose samples: give step a closure, {self._closure}"
            )
        draw = random.Random(f"{self.seed}:{step.number}")
        kept = {parameter for parameter in step.candidates() if draw.random() < self.beta}
        step.pays = step.pays and len(kept) > 0

        def whole() -> Tensor:
            before.append(self._backward(losses, EVERY_SAMPLE))
            return before[0].mean()

        def share() -> None:
            keep: Any = EVERY_SAMPLE
            if self.gamma < 1:
                with torch.no_grad():
                    keep = most_risen(before[0], losses(EVERY_SAMPLE), self.gamma)
            self._backward(losses, keep)

        step.closure = whole
        yield from step.first()
        if step.pays:
            pairs = [pair for pair in zip(*step.perturbed(), strict=True) if pair[0] in kept]
            parameters, directions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            del pairs  # or the first gradients would be held during the second pass
            step.closure = share
            yield from step.second(parameters, directions, rho=step.rho / self.beta, eps=1e-7)

    def _backward(self, losses: Callable[..., Any], keep: Any) -> Tensor:
        """Leaves the gradient of the mean loss of the samples kept, and returns their losses."""
        self.zero_grad()
        found = losses(keep)
        if not isinstance(found, Tensor) or found.ndim != 1:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InvalidArgumentError(
                f"the closure of ESAM must return one loss a sample, of shape (samples,), got {what}; {self._closure}"
            )
        self.scaler.scale(found.mean()).backward()  # type: ignore[no-untyped-call]
        return found.detach()
