"""S2-SAM: SAM at the price of the base optimizer, perturbed along the gradient of the step before.

Ji et al., NeurIPS 2024.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ._foreach import clones
from ._one_pass import OnePass
from ._perturbation import Rho, Scaling
from ._step import Step


class S2SAM(OnePass):
    """S2-SAM: steps with the gradient taken ``rho`` up the slope of the step before; one forward-backward pass a step.

    ::

        e = rho * g' / (|g'| + 1e-12)     g' the gradient with which the step before was made
        w = base step from w with the gradient at w + e

    *A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse Training*,
    Ji et al., NeurIPS 2024.

    The opposite sign to `MSAM`. The first step is a plain base-optimizer step. Memory: one copy of the perturbed
    weights during the pass, and the gradient of the step before, of the perturbed parameters.

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
        model: The network that your loop calls. ``loss.backward()`` and ``step()`` then need no closure: its forward
            passes in training mode are at the perturbed weights, which are put back when backward is over. All its
            buffers are put back in a step that is dropped. None (default): `step` needs a closure, and the buffers of
            torch's normalisation layers are put back.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.S2SAM(base, rho=0.05, model=model)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
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
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            parameters=parameters,
            scaling=scaling,
            scaler=scaler,
            max_norm=max_norm,
            model=model,
        )

    def _direction(self, step: Step) -> tuple[list[Tensor], list[Tensor], float]:
        return *self._memory.known("gradient", step.candidates()), 1.0

    def _made(self, step: Step) -> None:
        parameters, gradients = step.to_perturb()
        self._memory.replace("gradient", parameters, clones(gradients))
