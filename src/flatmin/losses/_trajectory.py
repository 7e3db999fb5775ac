"""The formula that SAF and MESA share: equations 8 and 12 of the paper, a pure function.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Softened logits are held within this bound, so that no difference of two of them overflows. Far below it already, the
# smaller of two has probability 0.
BOUND = 1e30


def trajectory_loss(logits: Tensor, target: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Divergence of what a network says from what it said before, averaged over the batch.

    ``T**2 / B * sum_i mask_i * KL(softmax(target_i / T) || softmax(logits_i / T))``

    The factor ``T**2`` keeps the gradient's size independent of ``T``, as in distillation (Hinton et al., 2015). The
    paper's equations do not write it, the authors' code has it; divide the coefficient by ``T**2`` to be without it.

    Args:
        logits: What the network says now, shape (B, C), any floating dtype.
        target: What it said before, shape (B, C). No gradient flows into it.
        temperature: ``T`` > 0, dividing both.
        mask: Which samples count, bool, shape (B,); all of them if None. The mean is over ``B`` all the same.

    Returns:
        A scalar, float64 if ``logits`` are float64 and float32 otherwise, inside autocast too. Finite if both
        arguments are finite.

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
