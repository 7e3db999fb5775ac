"""In which order a GPU has images in memory: channels last, for which its convolutions are made."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..problems.problem import Problem
from ..recipe import Recipe
from . import feed


def layout_of(problem: Problem, recipe: Recipe, device: torch.device) -> torch.memory_format | None:
    """Channels last for the images of named data sets on a GPU; None: as they come.

    The network of an experiment file may take ``view`` of what it computes, which holds in one order alone.
    """
    if recipe.experiment is not None or device.type not in feed.HELD:
        return None
    images = isinstance(problem.train, TensorDataset) and problem.train.tensors[0].ndim == 4
    return torch.channels_last if images or recipe.data.startswith("folder:") else None


def to_layout(network: nn.Module, layout: torch.memory_format | None) -> None:
    """Brings a network's kernels of two dimensions into a layout."""
    if layout is not None and all(parameter.ndim < 5 for parameter in network.parameters()):
        network.to(memory_format=layout)  # type: ignore[call-overload]


def in_layout(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """A batch in a layout."""
    return x if layout is None or x.ndim != 4 else x.contiguous(memory_format=layout)
