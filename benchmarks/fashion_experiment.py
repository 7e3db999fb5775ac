"""An experiment file: Fashion-MNIST with a network whose step takes a tenth of `cnn`'s, for many runs on a CPU.

The folder ``fashion-mnist`` is a link to that of Debian's package `dataset-fashion-mnist`.

    flatmin compare benchmarks/fashion_experiment.py --train-samples 10000 --epochs 10 --methods base,sam,saf ...
"""

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from flatmin.lab.problems.data import load_idx

FOLDER = "fashion-mnist"


def model() -> nn.Module:
    """Three convolutions of stride 2 with batch norm, the mean over the image, a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train_set() -> "Dataset[Any]":
    """60,000 images, of which ``--train-samples`` takes some."""
    return load_idx(FOLDER).train


def test_set() -> "Dataset[Any]":
    """10,000 images."""
    return load_idx(FOLDER).test
