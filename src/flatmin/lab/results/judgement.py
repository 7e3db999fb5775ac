"""Which rows are better or worse than the base beyond noise, and that in words."""

from collections.abc import Sequence
from typing import Literal

from .rows import Row
from .values import count_of, join

LEAST_SEEDS = 5  # for a claim
LEVEL = 0.05  # of significance, two-sided

Finding = Literal["better", "worse", "open", "few", "diverged"]


def judge(row: Row, seeds: int) -> Finding:
    """Whether a row is ``better`` or ``worse`` than the base beyond noise, ``open``, or has too ``few`` seeds.

    A row of which any seed diverged is ``diverged``.

    It is better or worse if its paired difference is significant at 5 %, two-sided, after Holm's correction for the
    number of rows. Fewer than 5 seeds support no claim: accuracies are counts of samples, so a few differences are
    often equal by chance, which looks like certainty.

    Args:
        row: A row other than the base.
        seeds: How many seeds every row has finished.
    """
    if row.diverged:
        return "diverged"
    if seeds < LEAST_SEEDS or row.p_value_holm is None or row.difference is None:
        return "few"
    return "open" if row.p_value_holm >= LEVEL else "better" if row.difference.mean > 0 else "worse"


def verdict(rows: Sequence[Row], seeds: int, *, most: int | None = None) -> str:
    """Says in plain words which rows are better than the base beyond noise, by `judge`, and at what cost.

    Args:
        rows: Of a comparison, the base first.
        seeds: How many seeds every row has finished.
        most: With more rows than this beside the base, say how many are better and name the best; None to name all.
    """
    base, others = rows[0], rows[1:]
    if not seeds:
        return "No seed was finished by every method, so there is nothing to compare."
    if base.diverged:
        return f"{_diverged([base])} It is the base, so there is nothing to compare with."
    if not others:
        return f"{base.label} alone: there is nothing to compare it with."
    if seeds < LEAST_SEEDS:
        few = f"{count_of(seeds, 'finished seed')}: too few for a claim, which takes {LEAST_SEEDS}."
        lost = [row for row in others if row.diverged]
        return f"{few} {_diverged(lost)}" if lost else few
    found: dict[str, list[Row]] = {"better": [], "worse": [], "open": [], "few": [], "diverged": []}
    for row in others:
        found[judge(row, seeds)].append(row)
    lost = found["diverged"]
    better, worse, rest = found["better"], found["worse"], found["open"] + found["few"]
    fine = (
        f"(Paired over {seeds} seeds, two-sided t-test at {100 * LEVEL:g} %, Holm-corrected for "
        f"{count_of(len(others) - len(lost), 'comparison')}; this data, network and recipe only.)"
    )
    if most is not None and len(others) > most:
        brief = _brief(rows, better, len(worse), len(rest))
        return " ".join([*brief, *([_diverged(lost)] if lost else []), fine])
    sentences = [f"Better than {base.label} beyond noise here: {_gains(better) or 'none'}."]
    if worse:
        sentences.append(f"Worse: {_gains(worse)}.")
    if rest:
        sentences.append(f"Not told apart from it: {_gains(rest)}.")
    if lost:
        sentences.append(_diverged(lost))
    return " ".join([*sentences, fine])


def _brief(rows: Sequence[Row], better: Sequence[Row], worse: int, rest: int) -> list[str]:
    """How many rows are better, and the few that one would take."""
    others = len(rows) - 1
    many, lose = "is" if len(better) < 2 else "are", "is" if worse < 2 else "are"
    sentences = [
        f"{len(better) or 'None'} of {others} methods {many} better than {rows[0].label} beyond noise here, "
        f"{worse or 'none'} {lose} worse, and {rest or 'none'} not told apart."
    ]
    if better:
        best = max(better, key=lambda row: row.difference.mean if row.difference else 0.0)
        sentences.append(f"The most accurate of them: {_gains([best])}.")
        priced = [row for row in better if row.step_ratio is not None]
        if priced:
            cheapest = min(priced, key=lambda row: row.step_ratio or 0.0)
            sentences.append(f"The cheapest of them: {_gains([cheapest])}.")
    front = [row.label for row in pareto(rows)]
    if front:
        sentences.append(f"By their means, no other is at once as cheap and as accurate as {join(front)}.")
    return sentences


def _diverged(rows: Sequence[Row]) -> str:
    """Which rows have diverged, and with how many seeds, as a sentence."""
    each = (f"{row.label} ({row.diverged} of {count_of(len(row.test_accuracy), 'seed')})" for row in rows)
    return f"Diverged, so without a result: {', '.join(each)}."


def _gains(rows: Sequence[Row]) -> str:
    return ", ".join(
        f"{row.label} ({'no difference known' if row.difference is None else f'{row.difference.mean:+.2f} points'}"
        f"{'' if row.step_ratio is None else f' at {row.step_ratio:.2f} times the step'})"
        for row in rows
    )


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other row beats, being as cheap and as accurate and better in one of both; cheapest first."""
    known = [(row.step_ratio, -row.accuracy.mean, row) for row in rows if row.accuracy and row.step_ratio is not None]

    def beaten(cost: float, loss: float) -> bool:
        return any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b, _ in known)

    return [row for cost, loss, row in sorted(known, key=lambda each: each[:2]) if not beaten(cost, loss)]
