"""MSAM: SAM at the price of the base optimizer, perturbed along its momentum. Becker et al. 2024."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..errors import InvalidArgumentError
from ._joined import Joined
from ._one_pass import OnePass
from ._perturbation import Rho, Scaling
from ._step import Step

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


class MSAM(OnePass):
    """MSAM: steps with the gradient taken ``rho`` ahead along the momentum; one forward-backward pass a step.

    ::

        e = -rho * v / (|v| + 1e-12)     v the base optimizer's momentum
        w = base step from w with the gradient at w + e

    *Momentum-SAM: Sharpness Aware Minimization without Computational Overhead*, Becker et al. 2024, arXiv 2401.12033.

    The momentum points up the slope of the past batches, so that the weights are moved *down* it, to where the base
    optimizer is about to go; the other sign was reported to fail. The first step, before there is a momentum, is a
    plain base-optimizer step. Memory: one copy of the perturbed weights. The running statistics of batch norm are those
    of moved weights: make them anew before you evaluate, by ``torch.optim.swa_utils.update_bn(loader, model)``; with
    ``model=`` a first evaluation without it is warned of.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance that keeps ``momentum_buffer`` or
            ``exp_avg``, such as SGD with momentum, the Adam family, RMSprop with momentum.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 3.0, about the paper's
            for CIFAR-100; larger than SAM's. Or a function of the base optimizer to it (>= 0, called in each step): 0
            while ViTs warm up.
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
        InvalidArgumentError: (a ValueError) if an argument cannot be used; in the second step if the base optimizer
            keeps no momentum.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.MSAM(base, rho=3.0, model=model)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 3.0,
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
        candidates = step.candidates()
        known, found = momenta(candidates, self.base_optimizer.state)
        if step.index > 0 and (not found or isinstance(self.base_optimizer, Joined)):
            self._check_momentum(set(candidates))
        return known, found, -1.0

    def _check_momentum(self, candidates: set[Tensor]) -> None:
        """Refuses a base optimizer without momentum; of several, one that has stepped, and trains any to perturb."""
        joined = self.base_optimizer if isinstance(self.base_optimizer, Joined) else None
        for base in [self.base_optimizer] if joined is None else joined.optimizers:
            if momenta(list(base.state), base.state)[0]:
                continue
            stepped = bool(base.state) or all(group.get("momentum") == 0 for group in base.param_groups)
            perturbed = any(parameter in candidates for group in base.param_groups for parameter in group["params"])
            if joined is None or (stepped and perturbed):
                raise InvalidArgumentError(
                    f"base_optimizer {type(base).__name__} keeps none of {', '.join(NAMES)}, along which "
                    "MSAM perturbs; give SGD a momentum, or use S2SAM"
                    + ("" if joined is None else "; or leave what it trains out of parameters=")
                )
