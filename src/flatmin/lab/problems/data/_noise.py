"""Wrong labels on purpose: what a method does with them tells memorising from learning."""

import torch
from torch import Tensor

from ...._checks import check_integer, check_number
from ....errors import InvalidArgumentError

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def add_label_noise(targets: Tensor, fraction: float, num_classes: int, *, seed: int) -> Tensor:
    """Replaces a fraction of the labels by wrong ones.

    Exactly ``round(fraction * N)`` labels, chosen at random, change, each to a class drawn uniformly from the
    ``num_classes - 1`` others (symmetric noise).

    Args:
        targets: Labels of shape (N,), integers in ``[0, num_classes)``, on any device.
        fraction: How many of them to replace, in ``[0, 1)``.
        num_classes: Number of classes, at least 2.
        seed: The same seed gives the same noise, on every device.

    Returns:
        A noisy copy of ``targets``, of the same dtype and on the same device.

    Raises:
        InvalidArgumentError: If an argument is outside its range or ``targets`` are no labels of these.

    Example:
        >>> clean = torch.zeros(10, dtype=torch.int64)
        >>> noisy = add_label_noise(clean, 0.3, 5, seed=0)
        >>> int((noisy != clean).sum())
        3
    """
    fraction = check_number("fraction", fraction, least=0, below=1)
    check_integer("num_classes", num_classes, least=2)
    check_integer("seed", seed, least=0)
    if targets.ndim != 1 or targets.dtype not in _INTEGERS:
        raise InvalidArgumentError(
            f"targets must be integers of shape (N,), got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    unknown = targets[(targets < 0) | (targets >= num_classes)]
    if len(unknown):
        raise InvalidArgumentError(
            f"targets must be in [0, num_classes) = [0, {num_classes}), got {sorted(set(unknown.tolist()))}"
        )

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(targets), generator=generator)[: round(fraction * len(targets))]
    shift = torch.randint(1, num_classes, chosen.shape, generator=generator)
    chosen, shift = chosen.to(targets.device), shift.to(targets.device)
    noisy = targets.clone()
    noisy[chosen] = ((targets[chosen] + shift) % num_classes).to(targets.dtype)
    return noisy
