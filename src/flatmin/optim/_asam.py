"""ASAM: SAM in a neighbourhood that does not change when a layer is rescaled. Kwon et al., ICML 2021."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ._base import SharpnessAware
from ._perturbation import Elementwise, Rho
from ._step import Passes, Step
from .schedules import Schedule


class ASAM(SharpnessAware):
    """ASAM: SAM that moves each weight in proportion to its own square; two forward-backward passes a step.

    ::

        e = rho * T^2 g / (|T g| + 1e-16)     T = |w| + eta for weights, 1 for biases
        w = base step from w with the gradient at w + e

    *ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks*, Kwon et al.,
    ICML 2021, arXiv 2102.11600.

    It is ``SAM(..., scaling=Elementwise(eta))`` with its paper's defaults. `Elementwise` says what counts as a weight:
    tensors of two dimensions and more. The authors' code goes by names, and takes normalisation layers' scales for
    weights too; pytorch-optimizer's ``adaptive=True`` takes every tensor, without eta. Memory: one copy of the
    perturbed weights, and two more for a moment before the second pass.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation relative to the weights, > 0; default 0.5, the paper's for CIFAR-10; 1 for
            CIFAR-100. About ten times SAM's. Or a function of the base optimizer to it (>= 0, called in each step).
        eta: Added to the absolute weights, >= 0; default 0.01.
        parameters: The tensors to perturb, some of the base optimizer's. None (default): all. All are trained in any
            case. For SAM-ON: ``flatmin.optim.normalization_parameters(model)``.
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
        >>> optimizer = flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, eta=0.01)
    """

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.5,
        eta: float = 0.01,
        parameters: Iterable[Tensor] | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
        scaling = Elementwise(eta)
        self.eta = scaling.eta
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
            yield from step.second_pass(eps=1e-16)
