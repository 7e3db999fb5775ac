"""Friendly SAM: perturbs along what is peculiar to the batch, not along the gradient of all of the data.

Li et al., CVPR 2024.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._foreach import blend, plus
from ._perturbation import Rho, Scaling
from ._step import Passes, Step
from .schedules import Schedule


def friendly(
    gradients: list[Tensor], momenta: Sequence[Tensor | None], sigma: float, lam: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The directions and the new momenta; where there is no momentum yet, both are the gradient."""
    directions = list(gradients)
    updated = [g.clone() if m is None else m for g, m in zip(gradients, momenta, strict=True)]
    old = [index for index, momentum in enumerate(momenta) if momentum is not None]
    known, means = [gradients[index] for index in old], [updated[index] for index in old]
    moved = zip(old, plus(known, means, alpha=-sigma), blend(means, known, 1 - lam), strict=True)
    for index, direction, momentum in moved:
        directions[index], updated[index] = direction, momentum
    return directions, updated


class FriendlySAM(SharpnessAware):
    """Friendly SAM: SAM along the gradient less its own moving mean; two forward-backward passes a step.

    ::

        d = g - sigma * m,   then   m = lam * m + (1 - lam) * g        at first m = g, d = g
        e = rho * d / (|d| + 1e-12)
        w = base step from w with the gradient at w + e

    *Friendly Sharpness-Aware Minimization*, Li et al., CVPR 2024, arXiv 2403.12350.

    Memory: one copy of the perturbed weights, the momenta, and their next values during the second pass. The momenta
    are those of the whole batch's gradient under ``DistributedDataParallel`` too; they move in the steps in which the
    second pass runs.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 0.2, the paper's. Or a
            function of the base optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        sigma: Share of the moving mean that is taken off, >= 0; default 1.0. At 0 it is SAM.
        lam: Momentum of the moving mean, in [0, 1); default 0.9; 0.6 to 0.95 in the paper.
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
        >>> optimizer = flatmin.FriendlySAM(base, rho=0.2, sigma=1.0, lam=0.9)
    """

    _mixes_steps = True
    _uses_first = True

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.2,
        sigma: float = 1.0,
        lam: float = 0.9,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
    ) -> None:
        self.sigma = check_number("sigma", sigma, least=0)
        self.lam = check_number("lam", lam, least=0, below=1)
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
            parameters, gradients = step.to_perturb()
            old = self._memory.get("momentum", parameters)
            directions, momenta = friendly(gradients, old, self.sigma, self.lam)
            del gradients
            yield from step.second_pass(parameters, directions)
            self._memory.put("momentum", parameters, momenta)
