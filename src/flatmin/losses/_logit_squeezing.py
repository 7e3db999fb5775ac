"""Logit squeezing: the trajectory loss with a uniform target, which remembers nothing.

At temperature 1 it is label smoothing (Szegedy et al. 2016, arXiv 1512.00567); at a high one ``T**2 KL(uniform ||
softmax(z / T))`` is half the variance of a sample's logits, logit squeezing (Kannan et al. 2018, arXiv 1803.06373).
"""

import torch
from torch import Tensor

from .._checks import check_number
from ._trajectory import trajectory_loss


def logit_squeezing(logits: Tensor, *, coefficient: float = 0.8, temperature: float = 5.0) -> Tensor:
    """Pulls the logits of each sample together.

    ``coefficient * T**2 / B * sum_i KL(uniform || softmax(logits_i / T))``

    Args:
        logits: The network's logits, floating, shape (B, C).
        coefficient: Weight of the loss, at least 0.
        temperature: ``T`` > 0.

    Returns:
        A scalar, float64 if ``logits`` are float64 and float32 otherwise. Add it to the criterion.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds.

    Example:
        >>> import torch
        >>> from flatmin.losses import logit_squeezing
        >>> logit_squeezing(torch.tensor([[2.0, 0.0]]), coefficient=1.0)
        tensor(0.4967)
    """
    check_number("coefficient", coefficient, least=0)
    check_number("temperature", temperature, above=0)
    return coefficient * trajectory_loss(logits, torch.zeros_like(logits), temperature=temperature)
