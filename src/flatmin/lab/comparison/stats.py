"""Confidence intervals and tests of a paired comparison, by scipy."""

import math
from collections.abc import Sequence

from ...errors import require
from ..results import Interval


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval (Student's t) of independent draws; of a single value there is no interval.

    Example:
        >>> from flatmin.lab.comparison.stats import interval
        >>> interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, half=2.484...)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean)
    stats = require("scipy.stats", install="flatmin[cli]")
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Interval(mean, float(stats.t.ppf(0.975, count - 1)) * error)


def paired_p_value(differences: Sequence[float], *, rounding: float = 0.0) -> float:
    """Two-sided p-value of the paired t-test, for the mean of ``differences`` being 0; 1 for fewer than two.

    Accuracies are counts of samples, so all differences can be equal and the statistic infinite. The result is then the
    p-value of the sign test, ``2 ** (1 - n)``.

    Args:
        differences: One for each pair.
        rounding: Differences that are no further apart than this are equal, and those no further from 0 are 0.

    Example:
        >>> from flatmin.lab.comparison.stats import paired_p_value
        >>> round(paired_p_value([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    if len(differences) < 2:
        return 1.0
    largest = max(abs(value) for value in differences)
    if max(differences) - min(differences) <= max(1e-9 * largest, rounding):  # equal but for rounding
        return 1.0 if largest <= rounding else 2.0 ** (1 - len(differences))
    stats = require("scipy.stats", install="flatmin[cli]")
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number by Holm's method; the order stays.

    Example:
        >>> from flatmin.lab.comparison.stats import holm
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted
