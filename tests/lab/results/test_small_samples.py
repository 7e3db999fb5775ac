"""How often the verdict on few seeds claims what the committed table of sixteen seeds does not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flatmin.lab.comparison.stats import holm
from flatmin.lab.results import Interval, Row, judge

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "digits.json"


def differences() -> dict[str, np.ndarray]:
    """Paired differences to the base by seed, for each other row."""
    base, *others = json.loads(RESULTS.read_text())["rows"]
    return {row["label"]: np.subtract(row["test_accuracy"], base["test_accuracy"]) for row in others}


def claims(p_values: np.ndarray, means: np.ndarray, seeds: int) -> list[str]:
    """What the rule says of each row of one comparison."""
    rows = zip(holm(list(p_values)), means, strict=True)
    return [judge(Row("row", difference=Interval(mean), p_value_holm=p), seeds) for p, mean in rows]


@pytest.mark.parametrize("seeds", [5, 6, 7, 8])
def test_it_contradicts_the_whole_table_in_less_than_one_of_twenty_draws(seeds):
    every = np.stack(list(differences().values()))
    whole = claims(stats.ttest_1samp(every, 0, axis=1).pvalue, every.mean(1), every.shape[1])
    draws = np.array(list(itertools.combinations(range(every.shape[1]), seeds)))
    draws = np.random.default_rng(0).permutation(draws)[:2000]
    drawn = every[:, draws]  # rows, draws, seeds
    with np.errstate(all="ignore"):  # differences may all be equal: then there is no claim here
        p_values = np.nan_to_num(stats.ttest_1samp(drawn, 0, axis=2).pvalue, nan=1.0)
    contradicted = 0
    for number in range(len(draws)):
        found = claims(p_values[:, number], drawn[:, number].mean(1), seeds)
        contradicted += any(
            one in ("better", "worse") and one != other for one, other in zip(found, whole, strict=True)
        )
    assert contradicted / len(draws) < 0.05
