"""Digits with skorch, whose nets have scikit-learn's interface: SAM by a function that makes the optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import Tensor, nn

import flatmin


def sam(parameters: Iterable[Tensor], lr: float, rho: float = 0.05, **keywords: Any) -> flatmin.SAM:
    """What skorch calls with the parameters, ``lr`` and what is given as ``optimizer__...``."""
    return flatmin.SAM(torch.optim.SGD(parameters, lr=lr, momentum=0.9), rho=rho, **keywords)


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=sam,
        optimizer__rho=0.05,
        optimizer__max_norm=5.0,  # in place of the callback GradientNormClipping, which would clip both gradients
        lr=0.05,
        batch_size=64,
        iterator_train__shuffle=True,
        max_epochs=epochs,
        verbose=0,
    )
    net.fit(x[:1200], y[:1200])
    return float(net.score(x[1200:], y[1200:]))


if __name__ == "__main__":
    print(f"test accuracy {100 * main():.2f} %")
