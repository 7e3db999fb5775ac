"""A random share of a batch, for what need not be computed on all of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def random_share(batch: int, fraction: float, seed: int) -> Tensor | None:
    """Draws ``max(1, round(fraction * batch))`` of a batch's positions, each as likely as any other.

    Args:
        batch: Size of the batch.
        fraction: In (0, 1].
        seed: The same seed draws the same; torch's own random state is not touched.

    Returns:
        The positions, int64, on the CPU, or None where they are all of them: nothing is drawn then.

    Example:
        >>> from flatmin.losses._share import random_share
        >>> len(random_share(8, 0.25, seed=0))
        2
    """
    size = max(1, round(fraction * batch))
    if size >= batch:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(batch, generator=generator, device="cpu")[:size]


def take(arguments: Any, index: Tensor, batch: int) -> Any:
    """Takes the samples ``index`` of every tensor of first dimension ``batch`` in ``arguments``.

    Args:
        arguments: Tensors, in tuples, lists and dicts or not; anything else in them passes as it is.
        index: Positions, on the CPU. No accelerator waits for them.
        batch: Size of the batch.
    """

    def taken(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        return tensor[index.to(tensor.device, non_blocking=True)]  # unlike index_select it keeps channels_last

    return tree_map_only(Tensor, taken, arguments)
