"""An experiment file: Fashion-MNIST with the CNN of the literature on differential privacy, with GroupNorm.

The folder ``fashion-mnist`` is a link to that of Debian's package `dataset-fashion-mnist`.

    flatmin compare benchmarks/fashion_private_experiment.py --private 2 --clip 0.1 --lr 4 --weight-decay 0 \
        --batch-size 2048 --epochs 5 --seeds 5 --methods base,dpsat --set dpsat.direction=gradient,step
"""

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from flatmin.lab.problems.data import load_idx

FOLDER = "fashion-mnist"


def model() -> nn.Module:
    """Papernot et al. 2021 and Tramer and Boneh 2021, with GroupNorm in front of the activations: 14,730 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.GroupNorm(4, 16),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.GroupNorm(4, 32),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def train_set() -> "Dataset[Any]":
    """60,000 images, of which ``--train-samples`` takes some."""
    return load_idx(FOLDER).train


def test_set() -> "Dataset[Any]":
    """10,000 images."""
    return load_idx(FOLDER).test
