"""Numbers and what they mean, as people say them."""

from collections.abc import Sequence

from ._study import Interval, Row, Study

LEAST_SEEDS = 5  # for a claim, as in the command's own verdict
LEVEL = 0.05
NONE = "\N{EN DASH}"  # where there is no number


def say(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for None.

    Example:
        >>> from flatmin.report._words import say
        >>> say(0.0123456), say(1234567.0)
        ('0.01235', '1.235e+06')
    """
    return NONE if value is None else f"{value:.{digits}g}"


def say_interval(interval: Interval | None, *, signed: bool = False) -> str:
    """Mean ± half width in percent or points; a dash for None."""
    if interval is None:
        return NONE
    mean = f"{interval.mean:+.2f}" if signed else f"{interval.mean:.2f}"
    return mean if interval.half is None else f"{mean} ± {interval.half:.2f}"


def say_bytes(count: float | None) -> str:
    """A number of bytes in a fitting unit, of 1000 each; a dash for None.

    Example:
        >>> from flatmin.report._words import say_bytes
        >>> say_bytes(999), say_bytes(96232)
        ('999 B', '96.2 kB')
    """
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def say_p(value: float | None) -> str:
    """A p-value to three decimals; a dash for None."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def judge(row: Row, seeds: int) -> str:
    """Whether a row is ``better`` or ``worse`` than the base beyond noise, ``open``, or ``few`` seeds for saying so."""
    if seeds < LEAST_SEEDS or row.p_value is None or row.difference is None:
        return "few"
    return "open" if row.p_value >= LEVEL else "better" if row.difference.mean > 0 else "worse"


def plain_verdict(study: Study) -> str:
    """What a comparison's numbers say, where the file brings no verdict of its own."""
    count, others = len(study.seeds), study.rows[1:]
    if not count:
        return "No seed was finished by every method, so there is nothing to compare."
    if not others:
        return f"{study.rows[0].label} alone: there is nothing to compare it with."
    if count < LEAST_SEEDS:
        return f"{_count(count, 'finished seed')}: too few for a claim, which takes {LEAST_SEEDS}."
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "few": []}
    for row in others:
        cost = "" if row.step_ratio is None else f" at {row.step_ratio:.2f} times the step"
        gain = "no difference known" if row.difference is None else f"{row.difference.mean:+.2f} points"
        groups[judge(row, count)].append(f"{row.label} ({gain}{cost})")
    sentences = [f"Better than {study.rows[0].label} beyond noise here: {', '.join(groups['better']) or 'none'}."]
    if groups["worse"]:
        sentences.append(f"Worse: {', '.join(groups['worse'])}.")
    if groups["open"] or groups["few"]:
        sentences.append(f"Not told apart from it: {', '.join(groups['open'] + groups['few'])}.")
    sentences.append(
        f"(Paired over {count} seeds, two-sided at 5 %, corrected for {_count(len(others), 'comparison')}; "
        "this data, network and recipe only.)"
    )
    return " ".join(sentences)


def run_verdict(study: Study) -> str:
    """What runs trained one by one came to, which is no comparison."""
    ends = [f"{row.label} {_ending(row)}" for row in study.rows]
    what = _count(len(study.runs), "run")
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
        >>> from flatmin.report._words import split_verdict
        >>> split_verdict("Better: sam (+1.5 points). Worse: esam. (Over 5 seeds.)")
        ('Better: sam (+1.5 points).', 'Worse: esam.', 'Over 5 seeds.')
    """
    fine = ""
    if text.endswith(".)") and ". (" in text:
        text, _, fine = text[:-1].rpartition(". (")
        text += "."
    first, stop, rest = text.partition(". ")
    return (first + ".", rest, fine) if stop else (text, "", fine)


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Words with commas, and the last with ``and``."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
