"""An experiment file: Fashion-MNIST with a small residual network that fits 10,000 images in 20 epochs.

As `fashion_experiment`, but deeper and trained for longer, for what only shows on a network that fits its training set.

    flatmin compare benchmarks/fashion_resnet_experiment.py --train-samples 10000 --epochs 20 --methods base,mesa ...
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flatmin.lab.problems.data import load_idx

FOLDER = "fashion-mnist"  # a link to that of Debian's package `dataset-fashion-mnist`
WIDTH = 8


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def model() -> nn.Module:
    """A stem of stride 2, three blocks of 8, 16 and 32 channels, the mean over the image, a linear layer."""
    stem = [nn.Conv2d(1, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    blocks = [Block(WIDTH, WIDTH, 1), Block(WIDTH, 2 * WIDTH, 2), Block(2 * WIDTH, 4 * WIDTH, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, 10))


def train_set() -> "Dataset[Any]":
    """60,000 images, of which ``--train-samples`` takes some."""
    return load_idx(FOLDER).train


def test_set() -> "Dataset[Any]":
    """10,000 images."""
    return load_idx(FOLDER).test
