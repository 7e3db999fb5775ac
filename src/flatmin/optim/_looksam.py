"""LookSAM: what SAM adds to the gradient changes slowly, so that it need not be found anew in each step.

Liu et al., CVPR 2022.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import Scalar, add_, clones, component, length, plus
from ._perturbation import Rho, Scaling
from ._step import Passes, Step, aligned
from .schedules import Every, Schedule


def orthogonal(first: list[Tensor], second: list[Tensor], norm: Scalar, other: Scalar) -> list[Tensor]:
    """The part of ``second``, whose norm is ``other``, that is orthogonal to ``first``, whose norm is ``norm``."""
    return plus(second, first, alpha=-component(second, first, other, norm))


def reuse_(gradients: list[Tensor], directions: list[Tensor], alpha: float, norm: Scalar) -> None:
    """Adds to ``gradients``, in place, ``directions`` brought to ``alpha`` times the length ``norm``."""
    add_(gradients, directions, alpha=alpha * norm / (length(directions) + 1e-8))


class LookSAM(SharpnessAware):
    """LookSAM: SAM in every ``k``-th step; the others have one pass, and reuse what the last second pass added.

    ::

        every k-th step:   g~ = gradient at w + e, e as in SAM
                           g_v = g~ - (g~ . g / |g|^2) g          one projection over all parameters
                           w = base step from w with g~
        the others:        w = base step from w with g + alpha * |g| / (|g_v| + 1e-8) * g_v

    *Towards Efficient and Scalable Sharpness-Aware Minimization*, Liu et al., CVPR 2022, arXiv 2203.02714.

    The closure is called ``(k + 1) / k`` times a step on average. Memory: one buffer of the weights' size; in the steps
    with a second pass also one copy of the perturbed weights and one of the first gradient. The first gradient goes
    into what is kept, so under ``DistributedDataParallel`` it is always that of the whole batch. The projection is one
    over all parameters, as in the paper's algebra; pytorch-optimizer projects each tensor by itself.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 0.05, SAM's. Or a
            function of the base optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        k: Steps from one second pass to the next, at least 1; default 5, the paper's for ViT. Unused if ``when`` is
            given.
        alpha: Weight of what is reused, >= 0; default 0.7; 0.2 to 0.7 in the paper.
        parameters: The tensors to perturb, some of the base optimizer's. None (default): all. All are trained in any
            case. For SAM-ON: ``flatmin.optim.normalization_parameters(model)``.
        scaling: How the direction becomes a perturbation. None (default): divided by its L2 norm over all perturbed
            parameters. `Elementwise`: in proportion to each weight, as in ASAM.
        scaler: The ``torch.amp.GradScaler`` that the closure scales the loss with, for float16. None (default): the
            loss is not scaled. Call ``scaler.update()`` after each step.
        max_norm: Clips the gradient that the base optimizer steps with to this L2 norm, > 0. None (default): no
            clipping. The gradient that makes the perturbation is never clipped.
        when: In which steps the second pass runs: a function of the step index (from 0) to a bool, or a `Schedule`
            such as `Every`, `Late`, `Sometimes` and `Adaptive`. None (default): in every ``k``-th.
        model: The network, the outermost module; all its buffers then stand still in the second pass and in a step that
            is dropped. None (default): those of torch's normalisation layers do, which are looked for, and DDP modules
            are found as they are called. Give it if other buffers move in a forward pass (spectral norm, codebooks, own
            layers), and for a compiled model, of which torch warns otherwise.
        same_randomness: True (default): the second pass draws the random numbers of the first from the generators of
            torch, Python and numpy, and leaves them as one pass would. False: it draws new ones.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> base = torch.optim.AdamW(torch.nn.Linear(4, 3).parameters())
        >>> optimizer = flatmin.LookSAM(base, rho=0.05, k=5, alpha=0.7)
    """

    _uses_first = True

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
    ) -> None:
        self.alpha = check_number("alpha", alpha, least=0)
        super().__init__(
            base_optimizer,
            rho=rho,
            parameters=parameters,
            scaling=scaling,
            scaler=scaler,
            max_norm=max_norm,
            when=Every(k) if when is None else when,
            model=model,
            same_randomness=same_randomness,
        )

    def _gradient(self, step: Step) -> Passes:
        yield from step.first_pass()
        if step.second_runs:
            parameters, first = step.parameters, clones(step.gradients)
            yield from step.second_pass()
            first, norm = step.beside_second(parameters, first)
            self._memory.replace("direction", step.parameters, orthogonal(first, step.gradients, norm, step.norm))
        elif step.rho > 0:
            known, directions = self._memory.known("direction", step.parameters)
            if known:
                reuse_(aligned(known, step.parameters, step.gradients), directions, self.alpha, step.norm)
