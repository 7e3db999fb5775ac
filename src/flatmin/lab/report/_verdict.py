"""What was found, in sentences."""

from ..results import Row
from ..results.values import count_of
from ._study import Study

MANY = 6  # methods beside the base: of more, not each is named


def run_verdict(study: Study) -> str:
    """What runs trained one by one came to, which is no comparison."""
    ends = [f"{row.label} {_ending(row)}" for row in study.rows]
    what = count_of(len(study.runs), "run")
    return (
        f"{what}, test accuracy after the last epoch: {', '.join(ends)}. Runs trained one by one show how training "
        "went; whether a method helps is for flatmin compare to say."
    )


def _ending(row: Row) -> str:
    if row.diverged:
        return row.say_diverged()
    if row.accuracy is None:
        return "unknown"
    over = f" (mean of {len(row.test_accuracy)} seeds)" if len(row.test_accuracy) > 1 else ""
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
