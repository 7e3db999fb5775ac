"""The rows of a comparison as text: what the command prints, and `print` of a result."""

from collections.abc import Sequence

from .after import AFTER
from .judgement import LEAST_SEEDS, LEVEL
from .rows import Row
from .values import count_of, say_bytes

Table = list[list[str]]  # its headings first


def main_table(rows: Sequence[Row]) -> Table:
    """Accuracy, difference to the base and cost of each row; of private runs also the epsilon that was spent."""
    private = any(row.epsilon is not None for row in rows)
    head = ["method", "test accuracy %", "paired difference", "time/step", "extra memory"]
    return [
        [*head, *(["epsilon spent"] if private else [])],
        *([*_cells(row), *([_or_dash(row.epsilon, "{:.3f}")] if private else [])] for row in rows),
    ]


def _cells(row: Row) -> list[str]:
    is_base = row.p_value_holm is None
    return [
        row.label,
        row.say_diverged() if row.diverged else "" if row.accuracy is None else row.accuracy.say(),
        "" if row.difference is None or is_base else row.difference.say(signed=True),
        _or_dash(row.step_ratio, "{:.2f}x"),
        "-" if row.extra_bytes is None else say_bytes(row.extra_bytes),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def after_names(rows: Sequence[Row]) -> list[str]:
    """Names of what was measured after training, in the order of `AFTER`, others as they come."""
    found = dict.fromkeys(name for row in rows for name in row.after)
    return sorted(found, key=lambda name: list(AFTER).index(name) if name in AFTER else len(AFTER))


def after_table(rows: Sequence[Row], seeds: int) -> Table:
    """What was measured after training; empty if nothing was."""
    names = after_names(rows)
    if not names:
        return []
    return [
        ["after training", *(AFTER.get(name, name) for name in names)],
        *([row.label, *(_after(row, name, min(seeds, measured_seeds(rows))) for name in names)] for row in rows),
    ]


def measured_seeds(rows: Sequence[Row]) -> int:
    """Of how many seeds something was measured after training; not of all where the measuring was interrupted."""
    return max((len(each.values) for row in rows for each in row.after.values()), default=0)


def _after(row: Row, name: str, seeds: int) -> str:
    if name not in row.after:
        return "-"
    found = row.after[name]
    sure = seeds >= LEAST_SEEDS and found.p_value_holm is not None and found.p_value_holm < LEVEL
    return f"{found.say()}{'*' if sure else ''}"


def after_caption(rows: Sequence[Row], seeds: int) -> str:
    """One line on what the table of `after_table` says."""
    measured = min(seeds, measured_seeds(rows))
    count = sum(each.p_value_holm is not None for row in rows for each in row.after.values())
    sure = (
        f"* beyond noise at {100 * LEVEL:g} %, Holm-corrected for {count_of(count, 'comparison')}"
        if measured >= LEAST_SEEDS
        else f"too few seeds for a claim, which takes {LEAST_SEEDS}"
    )
    some = f" of {measured} of {count_of(seeds, 'seed')}" if measured < seeds else ""
    return f"After training: test accuracy %{some}, in brackets the paired difference to {rows[0].label}; {sure}."


def as_text(table: Table) -> str:
    """A table in lines of one width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)
