"""SAM: the gradient at the worst point nearby.

*Sharpness-Aware Minimization for Efficiently Improving Generalization*, Foret et al., ICLR 2021, arXiv 2010.01412::

    e = rho * g / (|g| + 1e-12)     g the gradient at w, |g| its norm over all parameters
    w = base step from w with the gradient at w + e
"""

from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_number
from ._base import SharpnessAware
from ._tensors import add_


def sam_scale(norm: float, rho: float) -> float:
    """The factor that turns a gradient of norm ``norm`` into a perturbation of norm ``rho``."""
    return rho / (norm + 1e-12)


class SAM(SharpnessAware):
    """Steps with the gradient taken ``rho`` up the slope: two passes a step, and one copy of the weights.

    Everything else (what is shared with the base optimizer, batch-norm statistics, gradients that are not finite) is
    said in `SharpnessAware`.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation over all parameters together, > 0.
        model: The network; seldom needed, see `SharpnessAware`.
        norm: Whose gradient makes the perturbation where several processes train together, ``"rank"`` or ``"global"``;
            see `SharpnessAware`.

    Raises:
        InvalidArgumentError: (a ValueError) if ``rho`` is not positive, ``norm`` is neither of the two, or
            ``base_optimizer`` is not fit.

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
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        model: nn.Module | None = None,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
        self.rho = check_number("rho", rho, above=0)
        super().__init__(base_optimizer, model=model, norm=norm)

    def _perturb(self, parameters: list[Tensor], gradients: list[Tensor], norm: float) -> None:
        add_(parameters, gradients, alpha=sam_scale(norm, self.rho))
