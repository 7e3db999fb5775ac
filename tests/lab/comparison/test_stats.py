"""Intervals and tests against scipy and against numbers by hand."""

import math
import random

import pytest
import scipy.stats
import torch

from flatmin.lab.comparison.outcome import compared
from flatmin.lab.comparison.stats import holm, interval, paired_p_value
from flatmin.lab.results import Interval

DRAWS = random.Random(0)
SAMPLES = [[DRAWS.gauss(97, 0.5) for _ in range(count)] for count in (2, 3, 5, 16, 100)]


@pytest.mark.parametrize("values", SAMPLES, ids=len)
def test_the_interval_is_students(values):
    found = interval(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values)
    )
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9)


def test_the_interval_by_hand():
    # mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027
    assert interval([1, 2, 3]).half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_the_interval_of_one_value_is_unknown():
    assert interval([3.0]).mean == 3
    assert interval([3.0]).half is None


def test_the_interval_without_spread_is_a_point():
    assert interval([3.0, 3.0]) == Interval(3.0, 0.0)


@pytest.mark.parametrize("base", SAMPLES, ids=len)
def test_the_p_value_is_that_of_the_paired_t_test(base):
    ours = [value + DRAWS.gauss(0.2, 0.3) for value in base]
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    assert paired_p_value(differences) == pytest.approx(scipy.stats.ttest_rel(ours, base).pvalue, rel=1e-9)


def test_the_p_value_is_two_sided():
    assert paired_p_value([1, 2, 3]) == pytest.approx(paired_p_value([-1, -2, -3]))
    assert paired_p_value([1, 2, 3]) == pytest.approx(0.0742, abs=1e-4)


@pytest.mark.parametrize("differences", [[], [0.0], [5.0], [0.0, 0.0], [0.0] * 5], ids=str)
def test_without_evidence_the_p_value_is_one(differences):
    assert paired_p_value(differences) == 1


def test_two_equal_differences_are_no_evidence():
    assert paired_p_value([1.12, 1.12]) > 0.05


def test_accuracies_in_float32_that_differ_by_the_same_are_no_more_evidence_than_exact_ones():
    base = [torch.tensor(share).item() for share in (0.355, 0.375, 0.315, 0.905, 0.715)]
    ours = [torch.tensor(share).item() for share in (0.335, 0.355, 0.295, 0.885, 0.695)]
    percent = [[100 * share for share in shares] for shares in (ours, base)]
    found = compared(*percent)
    assert found.p_value == paired_p_value([-2.0] * 5) == 2.0**-4
    nothing = compared(percent[1], [value * (1 + 5e-8) for value in percent[1]])
    assert nothing.p_value == 1
    assert nothing.difference.say(signed=True).startswith("+0.00")


def test_differences_equal_but_for_rounding_give_no_warning():
    paired_p_value([0.1 + 0.2, 0.3])


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.03, 0.01], [0.06, 0.06, 0.03]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.0125, 0.0125, 0.0125, 0.0125], [0.05] * 4),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.001, 0.2, 0.02, 0.9], [0.004, 0.4, 0.06, 0.9]),
    ],
    ids=str,
)
def test_holm_by_hand(given, adjusted):
    assert holm(given) == pytest.approx(adjusted)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_holm_lies_between_nothing_and_bonferroni(count):
    given = [DRAWS.random() ** 3 for _ in range(count)]
    for p, adjusted in zip(given, holm(given), strict=True):
        assert p <= adjusted <= min(1, count * p)
