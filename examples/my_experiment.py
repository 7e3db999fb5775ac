"""An experiment file: your data and your network, in functions that flatmin calls.

    flatmin compare examples/my_experiment.py --epochs 30
    flatmin train examples/my_experiment.py --method saf

The example: is a breast tumour benign or malignant? 569 patients, 30 measurements each, from scikit-learn.
"""

from collections.abc import Iterable

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset


def model() -> nn.Module:
    """Returns a fresh network. flatmin sets the random seed and calls this once for each run."""
    return nn.Sequential(
        nn.Linear(30, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 2),  # one logit for each class, no softmax; two classes need two logits
    )


def train_set() -> TensorDataset:
    """Returns the training set: any data set of pairs (input, class index), classes from 0."""
    return _split()[0]


def test_set() -> TensorDataset:
    """Returns the test set. It shares no patient with the training set."""
    return _split()[1]


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the plain optimizer, which is the base of the comparison. Without this function, --optimizer is."""
    return torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.01)


# Optional: criterion() returns a loss of (logits, class indices). Without it, the cross entropy is taken.


def _split() -> tuple[TensorDataset, TensorDataset]:
    """Half of the patients to train on, half to test on, always the same halves."""
    table = load_breast_cancer()
    inputs, labels = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    # Scaled by the training half alone: nothing of the test half may leak into what the network sees.
    mean, std = inputs[train].mean(dim=0), inputs[train].std(dim=0)
    inputs = (inputs - mean) / std
    return TensorDataset(inputs[train], labels[train]), TensorDataset(inputs[test], labels[test])
