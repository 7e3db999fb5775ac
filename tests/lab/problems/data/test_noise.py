import pytest
import torch

from flatmin.errors import InvalidArgumentError
from flatmin.lab.problems.data import add_label_noise


@pytest.mark.parametrize("fraction", [0, 0.1, 0.255, 0.999])
@pytest.mark.parametrize("num_classes", [2, 7])
def test_exactly_the_fraction_is_wrong_and_within_the_classes(fraction, num_classes):
    targets = torch.arange(1000) % num_classes
    noisy = add_label_noise(targets, fraction, num_classes, seed=3)
    assert (noisy != targets).sum() == round(fraction * 1000)
    assert noisy.min() == 0
    assert noisy.max() == num_classes - 1


def test_wrong_labels_are_uniform_over_the_other_classes():
    targets = torch.full((40_000,), 2)
    counts = add_label_noise(targets, 0.75, 4, seed=0).bincount(minlength=4)
    assert counts[2] == 10_000
    assert (counts[[0, 1, 3]] - 10_000).abs().max() < 400


def test_wrong_labels_are_spread_over_the_data_set():
    targets = torch.zeros(10_000, dtype=torch.int64)
    wrong = add_label_noise(targets, 0.5, 2, seed=0).view(10, 1000).sum(1)
    assert (wrong - 500).abs().max() < 80


def test_the_seed_decides_and_the_argument_is_kept():
    targets = torch.arange(100) % 10
    before = targets.clone()
    first = add_label_noise(targets, 0.5, 10, seed=1)
    assert first.equal(add_label_noise(targets, 0.5, 10, seed=1))
    assert not first.equal(add_label_noise(targets, 0.5, 10, seed=2))
    assert targets.equal(before)


def test_global_randomness_is_neither_used_nor_moved():
    state = torch.get_rng_state()
    add_label_noise(torch.zeros(10, dtype=torch.int64), 0.5, 2, seed=0)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_the_dtype_is_kept_without_overflow(dtype):
    targets = torch.full((500,), 99, dtype=dtype)
    noisy = add_label_noise(targets, 0.9, 100, seed=0)
    assert noisy.dtype == dtype
    assert (noisy != 99).sum() == 450
    assert noisy.min() >= 0
    assert noisy.max() < 100


def test_no_targets_stay_none():
    assert add_label_noise(torch.zeros(0, dtype=torch.int64), 0.5, 2, seed=0).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fraction": 1.0}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 3}, r"\[0, 3\).*\[3\]"),
        ({"seed": -1}, "seed"),
        ({"targets": torch.tensor([-1, 0])}, r"\[-1\]"),
        ({"targets": torch.zeros(4)}, "float32"),
        ({"targets": torch.zeros(4, dtype=torch.bool)}, "bool"),
        ({"targets": torch.zeros(4, 1, dtype=torch.int64)}, r"\(4, 1\)"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    arguments = {"targets": torch.arange(4), "fraction": 0.5, "num_classes": 4, "seed": 0} | changed
    with pytest.raises(InvalidArgumentError, match=message):
        add_label_noise(**arguments)
