"""What every loader returns, and what the loaders share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset


@dataclass(frozen=True)
class Split:
    """A training set and a test set of the same classes; an item of either is ``(input, label)``.

    Args:
        train: The set to train on.
        test: The set to measure on; it shares no item with ``train`` and has no class that ``train`` lacks.
        num_classes: Labels are integers in ``[0, num_classes)``.
        input_shape: Shape of one input: ``(channels, height, width)`` of an image, ``(channels, length)`` of a signal.
        classes: Name of each label, ``num_classes`` of them.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]


def tensor_split(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, classes: tuple[str, ...]) -> Split:
    """Returns the split of two sets in memory, standardised and with int64 labels.

    Args:
        train: Images of shape (N, C, H, W) or signals of shape (N, C, L), float32, and labels of shape (N,).
        test: The same of the test set.
        classes: Name of each label.
    """
    (x_train, y_train), (x_test, y_test) = train, test
    x_train, x_test = standardise(x_train, x_test)
    return Split(
        train=TensorDataset(x_train, y_train.long()),
        test=TensorDataset(x_test, y_test.long()),
        num_classes=len(classes),
        input_shape=tuple(x_train.shape[1:]),
        classes=classes,
    )


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts and scales both sets so that each channel of ``train`` has mean 0 and variance 1.

    The test set is not looked at. A channel that is constant in ``train`` is shifted and left unscaled.

    Args:
        train: Images of shape (N, C, H, W) or signals of shape (N, C, L), float32.
        test: The same, M of them.

    Returns:
        The two sets, standardised, as new tensors.

    Example:
        >>> pixels = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1, 1)
        >>> train, test = standardise(pixels[:2], pixels[2:])
        >>> train.flatten().tolist(), test.flatten().tolist()
        ([-1.0, 1.0], [3.0])
    """
    but_channels = (0, *range(2, train.ndim))
    std, mean = torch.std_mean(train, dim=but_channels, correction=0, keepdim=True)
    std = torch.where(std > 0, std, 1)
    return (train - mean) / std, (test - mean) / std


def stratified_halves(targets: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Divides the items of each class at random into two halves; the first gets the odd one.

    Args:
        targets: Labels of shape (N,).
        seed: The same seed gives the same halves.

    Returns:
        Two sorted int64 tensors of indices, disjoint and together ``0 .. N-1``.

    Example:
        >>> first, second = stratified_halves(torch.tensor([0, 0, 0, 0, 1, 1, 1]), seed=0)
        >>> len(first), len(second)
        (4, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in sorted(set(targets.tolist())):
        members = (targets == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        middle = (len(members) + 1) // 2
        first.append(members[:middle])
        second.append(members[middle:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values
