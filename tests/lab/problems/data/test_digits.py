import subprocess
import sys

import pytest
import torch
from sklearn import datasets

from flatmin.errors import InvalidArgumentError, MissingDependencyError
from flatmin.lab.problems.data import load_digits


def rows(images):
    """The images as a set; the raw digits hold no image twice."""
    return {tuple(image.flatten().tolist()) for image in images}


def raw(split):
    """The images of both halves as they were, darkest 0 and brightest 16."""
    (x_train, _), (x_test, _) = split.train.tensors, split.test.tensors
    darkest = min(x_train.min(), x_test.min())
    scale = 16 / (max(x_train.max(), x_test.max()) - darkest)
    return ((x_train - darkest) * scale).round(), ((x_test - darkest) * scale).round()


def test_the_split_describes_itself():
    split = load_digits()
    x, y = split.train.tensors
    assert (x.shape, x.dtype) == ((898, 1, 8, 8), torch.float32)
    assert (y.shape, y.dtype) == ((898,), torch.int64)
    assert len(split.test) == 899
    assert (split.num_classes, split.input_shape) == (10, (1, 8, 8))
    assert split.classes == tuple("0123456789")


def test_the_halves_are_disjoint_and_together_the_digits():
    digits = torch.from_numpy(datasets.load_digits().images)
    train, test = (rows(half) for half in raw(load_digits()))
    assert train.isdisjoint(test)
    assert train | test == rows(digits)


def test_labels_stay_with_their_images():
    digits = datasets.load_digits()
    label = {tuple(image.ravel().tolist()): int(y) for image, y in zip(digits.images, digits.target, strict=True)}
    split = load_digits(seed=1)
    for images, half in zip(raw(split), (split.train, split.test), strict=True):
        found = [label[tuple(image.flatten().tolist())] for image in images]
        assert found == half.tensors[1].tolist()


def test_the_halves_are_stratified():
    split = load_digits()
    counts = split.train.tensors[1].bincount(minlength=10) - split.test.tensors[1].bincount(minlength=10)
    assert counts.abs().max() <= 1


def test_the_training_half_alone_decides_the_standardisation():
    split = load_digits()
    x_train, x_test = split.train.tensors[0], split.test.tensors[0]
    assert x_train.mean().abs() < 1e-5
    assert (x_train.std(correction=0) - 1).abs() < 1e-5
    assert x_test.mean().abs() > 1e-4


def test_the_seed_decides_the_split():
    assert load_digits(1).train.tensors[0].equal(load_digits(1).train.tensors[0])
    assert not load_digits(1).train.tensors[1].equal(load_digits(2).train.tensors[1])


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_a_wrong_seed_is_named(seed):
    with pytest.raises(InvalidArgumentError, match="seed"):
        load_digits(seed)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[cli\]'"):
        load_digits()


def test_importing_the_package_loads_no_optional_dependency():
    module = "flatmin.lab.problems.data"
    command = f"import sys, torch; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert not {name.split(".")[0] for name in output.split()} & {"numpy", "sklearn", "PIL", "torchvision"}
