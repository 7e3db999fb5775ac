"""The handwritten digits that scikit-learn carries: real data without a download."""

import torch

from ...._checks import check_integer
from ....errors import require
from ._split import Split, tensor_split


def load_digits(seed: int = 0) -> Split:
    """Loads 1797 handwritten digits of 8x8 pixels, half to train on and half to test on.

    The halves (898 and 899 digits) are drawn from ``seed``, stratified by class, and standardised by the
    training half's mean and standard deviation.

    Args:
        seed: Seed of the split, at least 0. It draws the split and nothing else.

    Returns:
        The split: `TensorDataset`s of float32 images (N, 1, 8, 8) and int64 labels (N,).

    Raises:
        InvalidArgumentError: If ``seed`` is no integer of at least 0.
        MissingDependencyError: If scikit-learn is not installed.

    Example:
        >>> digits = load_digits()
        >>> len(digits.train), len(digits.test), digits.num_classes, digits.input_shape
        (898, 899, 10, (1, 8, 8))

    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    check_integer("seed", seed, least=0)
    datasets = require("sklearn.datasets", install="flatmin[cli]")
    model_selection = require("sklearn.model_selection", install="flatmin[cli]")

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=0.5, stratify=digits.target, random_state=seed
    )
    return tensor_split(
        (images[train], labels[train]),
        (images[test], labels[test]),
        classes=tuple(str(name) for name in digits.target_names),
    )
