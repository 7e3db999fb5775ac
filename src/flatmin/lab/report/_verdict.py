"""What was found, in sentences."""

from ._study import Row, Study, pareto
from ._words import count_of, join

LEAST_SEEDS = 5  # for a claim, as in the command's own verdict
LEVEL = 0.05
MANY = 6  # methods beside the base: of more, not each is named


def judge(row: Row, seeds: int) -> str:
    """Whether a row is ``better`` or ``worse`` than the base beyond noise, ``open``, or ``few`` seeds for saying so."""
    if seeds < LEAST_SEEDS or row.p_value is None or row.difference is None:
        return "few"
    return "open" if row.p_value >= LEVEL else "better" if row.difference.mean > 0 else "worse"


def plain_verdict(study: Study) -> str:
    """What a comparison's numbers say: each method by name, or of many how many help and which stand out."""
    count, others = len(study.seeds), study.rows[1:]
    if not count:
        return "No seed was finished by every method, so there is nothing to compare."
    if not others:
        return f"{study.rows[0].label} alone: there is nothing to compare it with."
    if count < LEAST_SEEDS:
        return f"{count_of(count, 'finished seed')}: too few for a claim, which takes {LEAST_SEEDS}."
    if len(others) > MANY:
        return _brief(study)
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "few": []}
    for row in others:
        groups[judge(row, count)].append(_gain(row))
    sentences = [f"Better than {study.rows[0].label} beyond noise here: {', '.join(groups['better']) or 'none'}."]
    if groups["worse"]:
        sentences.append(f"Worse: {', '.join(groups['worse'])}.")
    if groups["open"] or groups["few"]:
        sentences.append(f"Not told apart from it: {', '.join(groups['open'] + groups['few'])}.")
    sentences.append(_fine(count, len(others)))
    return " ".join(sentences)


def _gain(row: Row) -> str:
    cost = "" if row.step_ratio is None else f" at {row.step_ratio:.2f} times the step"
    gain = "no difference known" if row.difference is None else f"{row.difference.mean:+.2f} points"
    return f"{row.label} ({gain}{cost})"


def _fine(seeds: int, comparisons: int) -> str:
    return (
        f"(Paired over {seeds} seeds, two-sided at 5 %, corrected for {count_of(comparisons, 'comparison')}; "
        "this data, network and recipe only.)"
    )


def _brief(study: Study) -> str:
    """How many methods help, and the few that one would take; the table has the rest."""
    base, others, seeds = study.rows[0], study.rows[1:], len(study.seeds)
    found = [judge(row, seeds) for row in others]
    better = [row for row, word in zip(others, found, strict=True) if word == "better"]
    worse, rest = found.count("worse"), found.count("open") + found.count("few")
    many, lose = "is" if len(better) < 2 else "are", "is" if worse < 2 else "are"
    sentences = [
        f"{len(better) or 'None'} of {len(others)} methods {many} better than {base.label} beyond noise here, "
        f"{worse or 'none'} {lose} worse, and {rest or 'none'} not told apart."
    ]
    if better:
        best = max(better, key=lambda row: row.difference.mean if row.difference else 0.0)
        sentences.append(f"The most accurate of them: {_gain(best)}.")
        priced = [row for row in better if row.step_ratio is not None]
        if priced:
            cheapest = min(priced, key=lambda row: row.step_ratio or 0.0)
            sentences.append(f"The cheapest of them: {_gain(cheapest)}.")
    front = [row.label for row in pareto(study.rows)]
    if front:
        sentences.append(f"By their means, no other is at once as cheap and as accurate as {join(front)}.")
    return " ".join([*sentences, _fine(seeds, len(others))])


def run_verdict(study: Study) -> str:
    """What runs trained one by one came to, which is no comparison."""
    ends = [f"{row.label} {_ending(row)}" for row in study.rows]
    what = count_of(len(study.runs), "run")
    return (
        f"{what}, test accuracy after the last epoch: {', '.join(ends)}. Runs trained one by one show how training "
        "went; whether a method helps is for flatmin compare to say."
    )


def _ending(row: Row) -> str:
    if row.accuracy is None:
        return "unknown"
    over = f" (mean of {len(row.accuracies)} seeds)" if len(row.accuracies) > 1 else ""
    return f"{row.accuracy.mean:.2f} %{over}"


def split_verdict(text: str) -> tuple[str, str, str]:
    """Splits a verdict into its first sentence, the others, and the closing one in parentheses.

    Example:
        >>> from flatmin.lab.report._verdict import split_verdict
        >>> split_verdict("Better: sam (+1.5 points). Worse: esam. (Over 5 seeds.)")
        ('Better: sam (+1.5 points).', 'Worse: esam.', 'Over 5 seeds.')
    """
    fine = ""
    if text.endswith(".)") and ". (" in text:
        text, _, fine = text[:-1].rpartition(". (")
        text += "."
    first, stop, rest = text.partition(". ")
    return (first + ".", rest, fine) if stop else (text, "", fine)
