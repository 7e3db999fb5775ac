"""Classes that a network masks out with a logit of -inf."""

import torch
from torch import Tensor


def masked_classes(logits: Tensor) -> Tensor:
    """Where a logit is -inf, in rows whose largest logit is finite; bool, shape (B, C)."""
    if logits.shape[1] == 0:
        return logits == -torch.inf
    return (logits == -torch.inf) & logits.detach().amax(dim=1, keepdim=True).isfinite()


def filling(dtype: torch.dtype) -> float:
    """A logit that has no probability, yet is finite."""
    return max(-1e9, torch.finfo(dtype).min / 2)


def masked_filled(logits: Tensor) -> Tensor:
    """Logits in which such classes have no probability, yet are finite."""
    return logits.masked_fill(masked_classes(logits), filling(logits.dtype))
