"""Logit squeezing: the trajectory loss with a uniform target, which remembers nothing.

*Rethinking the Inception Architecture for Computer Vision*, Szegedy et al., CVPR 2016, arXiv 1512.00567 (label
smoothing); *Adversarial Logit Pairing*, Kannan et al. 2018, arXiv 1803.06373 (logit squeezing)::

    loss = coefficient * T**2 / B * sum_i KL(uniform || softmax(logits_i / T))
"""

import torch
from torch import Tensor

from .._checks import check_number, check_tensor
from ..errors import InvalidArgumentError
from ._trajectory import resolve_class_dim, trajectory_loss
from ._undivided import watched


def logit_squeezing(
    logits: Tensor, *, coefficient: float = 0.8, temperature: float = 5.0, class_dim: int | None = None
) -> Tensor:
    """Pulls the logits of each sample together. Try it first: it costs a softmax, and needs no index and no memory.

    ``coefficient * T**2 / B * sum_i KL(uniform || softmax(logits_i / T))``

    Add it to the plain cross entropy. It is SAF's and MESA's loss with the same logit for every class as its target.
    At ``T = 1`` it is, up to a constant, label smoothing (Szegedy et al. 2016) by ``coefficient / (1 + coefficient)``
    of the sum. At a high ``T`` it is ``coefficient / 2`` times the variance of a sample's logits, the logit squeezing
    of Kannan et al. (2018).

    The right strength depends on the noise in the labels: a coefficient of 2 to 5 was best where a fifth of them were
    wrong, 0.3 to 2 where they were clean (docs/findings/comparison.md).

    Leave out the columns of classes that cannot occur. The uniform target expects a share of every class, so a logit
    of -1e9 or -inf makes the loss huge, though still finite.

    Args:
        logits: The network's logits, floating, shape (B, C), C at least 2, or with more dimensions and ``class_dim``.
        coefficient: Weight of the loss, at least 0.
        temperature: ``T`` > 0.
        class_dim: Which dimension is the classes': 1 for maps (B, C, H, W), -1 for tokens (B, L, C); the mean is then
            over all pixels or tokens. None: 1, for logits of two dimensions alone.

    Returns:
        A scalar, at least 0; float64 if ``logits`` are float64 and float32 otherwise, inside autocast too. 0 for an
        empty batch.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or the logits have another shape or
            dtype.

    Example:
        >>> import torch, flatmin
        >>> logits, y = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> flatmin.logit_squeezing(logits)
        tensor(0.1987)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + flatmin.logit_squeezing(logits)
    """
    if check_tensor("logits", logits).shape[resolve_class_dim(logits, class_dim)] < 2:
        raise InvalidArgumentError(
            f"logits must be floating and of shape (batch, classes), with two classes at least, got {logits.dtype} of "
            f"shape {tuple(logits.shape)}; give a binary problem two logits, whose softmax is not constant"
        )
    coefficient = check_number("coefficient", coefficient, least=0)
    temperature = check_number("temperature", temperature, above=0)
    target = torch.zeros_like(logits)
    loss = coefficient * trajectory_loss(logits, target, temperature=temperature, class_dim=class_dim)
    return watched(loss, "logit_squeezing")
