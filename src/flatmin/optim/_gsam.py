"""GSAM: SAM that also closes the gap between the loss at the worst point nearby and that at the weights.

Zhuang et al., ICLR 2022.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import Scalar, add_, clones, component
from ._perturbation import Rho, Scaling
from ._step import Passes, Step
from .schedules import Schedule


def decompose_(second: list[Tensor], first: list[Tensor], alpha: float, norm: Scalar, other: Scalar) -> None:
    """Subtracts from ``second``, in place, ``alpha`` times the part of ``first`` that is orthogonal to it.

    Args:
        second: The gradients at the perturbed weights.
        first: Those at the weights; that part is made of them in place.
        alpha: Its weight.
        norm: The norm of ``first``.
        other: The norm of ``second``.
    """
    add_(first, second, alpha=-component(first, second, norm, other))
    some = other.sign() if isinstance(other, Tensor) else float(other > 0)  # 0 where there is no direction
    add_(second, first, alpha=-alpha * some)


class GSAM(SharpnessAware):
    """GSAM: SAM less ``alpha`` times the part of the first gradient orthogonal to the second; two passes a step.

    ::

        g~ = gradient at w + e,   e as in SAM
        g_perp = g - (g . g~ / |g~|^2) g~          one projection over all parameters
        w = base step from w with g~ - alpha * g_perp

    *Surrogate Gap Minimization Improves Sharpness-Aware Training*, Zhuang et al., ICLR 2022, arXiv 2203.08065.

    Memory: one copy of the perturbed weights and one of the first gradient. The first gradient is used in the step, so
    under ``DistributedDataParallel`` it is always that of the whole batch; the authors' code decomposes on each rank
    and averages then. Like the rule, and like pytorch-optimizer's, the projection is one over all parameters.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 0.04. Or a function of
            the base optimizer to it. The paper's falls with the learning rate, from 0.04 to 0.02 for ResNets and 0.6
            to 0.1 for ViT-B/32: ``flatmin.optim.RhoByLR(0.04, 0.02, lr_max=0.1)``.
        alpha: Weight of the orthogonal part, >= 0; default 0.01, the paper's for ResNets; 0.6 for ViT-B/32.
        parameters: The tensors to perturb, some of the base optimizer's. None (default): all. All are trained in any
            case. For SAM-ON: ``flatmin.optim.normalization_parameters(model)``.
        scaling: How the direction becomes a perturbation. None (default): divided by its L2 norm over all perturbed
            parameters. `Elementwise`: in proportion to each weight, as in ASAM.
        scaler: The ``torch.amp.GradScaler`` that the closure scales the loss with, for float16. None (default): the
            loss is not scaled. Call ``scaler.update()`` after each step.
        max_norm: Clips the gradient that the base optimizer steps with to this L2 norm, > 0. None (default): no
            clipping. The gradient that makes the perturbation is never clipped.
        when: In which steps the second pass runs: a function of the step index (from 0) to a bool, or a `Schedule`
            such as `Every`, `Late`, `Sometimes` and `Adaptive`. None (default): in all.
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
        >>> base = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.GSAM(base, rho=flatmin.optim.RhoByLR(0.04, 0.02, lr_max=0.1), alpha=0.01)
    """

    _uses_first = True
    _uses_both = True

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.04,
        alpha: float = 0.01,
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
            when=when,
            model=model,
            same_randomness=same_randomness,
        )

    def _gradient(self, step: Step) -> Passes:
        yield from step.first_pass()
        if step.second_runs:
            parameters, first = step.parameters, clones(step.gradients)
            yield from step.second_pass()
            first, norm = step.beside_second(parameters, first)
            decompose_(step.gradients, first, self.alpha, norm, step.norm)
