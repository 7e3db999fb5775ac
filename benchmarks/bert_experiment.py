"""An experiment file: the small BERT on descriptions of Debian packages, for all methods of the command.

The data, the network and the optimizer are those of `quantization.py`. It needs `pip install 'flatmin[transformers]'`
and Debian's ``apt-cache``.

    flatmin compare benchmarks/bert_experiment.py --after --batch-size 64 --epochs 9 --methods base,saf,mesa ...
"""

from collections.abc import Iterable
from functools import cache

import quantization
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SETTINGS = quantization.Settings()


@cache
def _data() -> quantization.Data:
    return quantization.read(SETTINGS)


def model() -> nn.Module:
    """One layer of 64."""
    network: nn.Module = quantization.Classifier(SETTINGS, _data())
    return network


def train_set() -> TensorDataset:
    """Numbers of words, and the package's section."""
    return TensorDataset(_data().x, _data().y)


def test_set() -> TensorDataset:
    """Likewise, of other packages."""
    return TensorDataset(_data().test_x, _data().test_y)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the learning rate falls along a cosine."""
    return torch.optim.AdamW(parameters, lr=SETTINGS.lr, weight_decay=0.01)


def shift(x: Tensor) -> Tensor:
    """Every second word is gone."""
    x = x.clone()
    x[:, 2::2] = 0
    return x
