"""A random share of a batch, for a loss that is estimated on part of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def random_share(batch: int, fraction: float, seed: int, least: int = 1) -> Tensor | None:
    """Draws ``max(least, round(fraction * batch))`` of a batch's positions, all with equal probability.

    Args:
        batch: Number of samples in the batch.
        fraction: Share of them, in (0, 1].
        seed: The same seed draws the same positions. torch's global generator is not used.
        least: Fewest that are drawn.

    Returns:
        The positions, int64, on the CPU; None if they would be all, and then nothing is drawn.

    Example:
        >>> from flatmin.losses._share import random_share
        >>> len(random_share(8, 0.25, seed=0))
        2
    """
    size = max(least, round(fraction * batch))
    if size >= batch:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(batch, generator=generator, device="cpu")[:size]


def take(arguments: Any, index: Tensor, batch: int) -> Any:
    """Takes the samples ``index`` of every tensor in ``arguments`` whose first dimension is ``batch``.

    Args:
        arguments: Tensors, also within tuples, lists and dicts. Anything else is passed on as it is.
        index: Positions, int64, on the CPU. They are copied to an accelerator without waiting.
        batch: Number of samples in the batch.
    """

    def taken(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        return tensor[index.to(tensor.device, non_blocking=True)]  # unlike index_select it keeps channels_last

    return tree_map_only(Tensor, taken, arguments)
