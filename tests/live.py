"""Logits as a network in training gives them: the losses leave those alone that need no gradient."""

from torch import Tensor


def live(logits: Tensor) -> Tensor:
    """The logits, such that a gradient of them is wanted."""
    return logits if logits.requires_grad else logits.detach().requires_grad_()
