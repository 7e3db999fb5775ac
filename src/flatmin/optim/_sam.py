"""SAM: the gradient at the worst point nearby. Foret et al., ICLR 2021."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ._base import SharpnessAware
from ._perturbation import Rho, Scaling
from ._step import Passes, Step
from .schedules import Schedule


class SAM(SharpnessAware):
    """SAM: steps with the gradient taken ``rho`` up the slope; two forward-backward passes a step.

    ::

        e = rho * g / (|g| + 1e-12)     g the gradient at w, |g| its norm over all parameters
        w = base step from w with the gradient at w + e

    *Sharpness-Aware Minimization for Efficiently Improving Generalization*, Foret et al., ICLR 2021, arXiv 2010.01412.

    Memory: one copy of the perturbed weights. What holds for all methods (batch-norm statistics, gradients that are not
    finite, several processes) is described in `SharpnessAware`.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 0.05. Or a function of
            the base optimizer to it (>= 0, called in each step), such as `RhoByLR`.
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
        norm: Whose gradient makes the perturbation under ``DistributedDataParallel``. ``"rank"`` (default): each rank's
            own, which is not communicated (m-sharpness, as in SAM's paper). ``"global"``: the whole batch's, as one
            process would.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> bool(optimizer.step(closure) < first)
        True
    """

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.05,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
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
            norm=norm,
        )

    def _gradient(self, step: Step) -> Passes:
        yield from step.first_pass()
        if step.second_runs:
            yield from step.second_pass()
