"""The loss that SAF and MESA share: equations 8 and 12 of the paper, as a pure function.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Softened logits are clamped to this bound, so that no difference of two of them overflows. Differences far smaller
# already give the smaller logit probability 0.
BOUND = 1e30


def trajectory_loss(logits: Tensor, target: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Divergence of a network's predictions from a target, such as its past predictions, averaged over the batch.

    ``T**2 / B * sum_i mask_i * KL(softmax(target_i / T) || softmax(logits_i / T))``

    The factor ``T**2`` keeps the size of the gradient independent of ``T``, as in distillation (Hinton et al. 2015,
    arXiv 1503.02531). The paper's equations omit it and the authors' code has it; divide your coefficient by ``T**2``
    to be without it.

    Args:
        logits: The current logits, floating, shape (B, C).
        target: The logits to stay close to, floating, shape (B, C). No gradient flows into them.
        temperature: ``T`` > 0; both are divided by it.
        mask: Bool, shape (B,): the samples that contribute. None: all. The mean is over all ``B`` in any case.

    Returns:
        A scalar, float64 if ``logits`` are float64 and float32 otherwise, inside autocast too. It is finite if both
        arguments are, and 0 for an empty batch.

    Example:
        >>> import torch
        >>> from flatmin.losses import trajectory_loss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> trajectory_loss(logits, logits, temperature=5.0)
        tensor(0.)
        >>> trajectory_loss(logits, -logits, temperature=5.0, mask=torch.tensor([True, False]))
        tensor(0.9869)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    divergence = F.kl_div(
        _log_softmax(logits.to(dtype), temperature),
        _log_softmax(target.detach().to(dtype), temperature),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    if mask is not None:
        divergence = divergence.where(mask, 0)
    return temperature**2 * divergence.sum() / max(len(logits), 1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).clamp(-BOUND, BOUND).log_softmax(dim=1)
