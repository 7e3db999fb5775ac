"""An experiment file: the next token of the standard library's source text, among 1,024.

The task, the network and the optimizer are those of `text_fidelity.py`; here for all methods of the command, and with
the settings chosen on held-out windows. It needs `pip install '.[benchmarks]'`.

    flatmin compare benchmarks/text_experiment.py --batch-size 512 --epochs 10 --methods base,saf,logit_squeezing ...
"""

from collections.abc import Iterable

import text_fidelity
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SETTINGS = text_fidelity.Settings()


def _samples(windows: Tensor) -> TensorDataset:
    windows = windows.long()
    return TensorDataset(windows[:, :-1], windows[:, -1])


def model() -> nn.Module:
    """One hidden layer over the embeddings of sixteen tokens."""
    network: nn.Module = text_fidelity.make_network(SETTINGS)
    return network


def train_set() -> TensorDataset:
    """Windows of sixteen tokens, and the one that follows."""
    return _samples(text_fidelity.read_library(SETTINGS).train)


def test_set() -> TensorDataset:
    """Likewise, from other modules of the library."""
    return _samples(text_fidelity.read_library(SETTINGS).test)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the learning rate falls along a cosine."""
    return torch.optim.AdamW(parameters, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
