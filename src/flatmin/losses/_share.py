"""A random share of a batch, for a loss that is estimated on part of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def random_share(batch: int, size: int, seed: int) -> Tensor:
    """Draws ``size`` of a batch's positions, all with equal probability.

    Args:
        batch: Number of samples in the batch.
        size: How many are drawn.
        seed: The same seed draws the same positions. torch's global generator is not used.

    Returns:
        The positions, int64, on the CPU.

    Example:
        >>> from flatmin.losses._share import random_share
        >>> len(random_share(8, 2, seed=0))
        2
    """
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
