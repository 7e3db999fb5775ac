"""What the command shows: progress, the table of a comparison, warnings."""

import io
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...errors import FlatminWarning
from ..comparison.outcome import Outcome, verdict

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


class _Notices(logging.Handler):
    """Shows what the library has to say of its own choices."""

    def emit(self, record: logging.LogRecord) -> None:
        err_console.print(record.getMessage(), markup=False)


@contextmanager
def speaking(*, quiet: bool) -> Iterator[None]:
    """Shows warnings and notices as lines of the command's own; nothing at all if ``quiet``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ± must not cost a result
    logger, notices = logging.getLogger("flatmin"), _Notices()
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quiet else "always", FlatminWarning)
        warnings.showwarning = show_warning
        out_console.quiet = quiet
        logger.addHandler(notices)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(notices)
            logger.setLevel(level)
            out_console.quiet = False


class Display:
    """Progress: a bar in a terminal, a line for each finished seed elsewhere."""

    def __init__(self, unit: str = "epochs") -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            console=err_console,
            transient=True,
            disable=not err_console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._said = ""

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, done: int, planned: int, word: str) -> None:
        """Shows how far it has come."""
        self._bar.update(self._task, completed=done, total=planned or None, description=word)
        if not err_console.is_terminal and word != self._said:
            self._said = word
            err_console.print(word, markup=False)


def print_outcome(outcome: Outcome, results: Path, page: Path | None = None) -> None:
    """Prints the table of a comparison, where its report and its numbers are, and the verdict as the last line."""
    if not outcome.seeds:
        out_console.print("No seed was finished by every method, so there is nothing to compare.")
        return
    recipe = outcome.recipe
    what = recipe.experiment or f"{recipe.data}, {recipe.model}"
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    out_console.print(f"{what}: {seeds}, {recipe.epochs} epochs, 95 % confidence intervals", markup=False)
    table = Table()
    table.add_column("method", no_wrap=True)
    for heading in ("test accuracy %", "paired difference", "time/step", "extra memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, entry in enumerate(outcome.table()):
        accuracy, difference = entry["accuracy"], entry["difference"]
        table.add_row(
            escape(entry["label"]),
            f"{accuracy['mean']:.2f}{_half(accuracy)}",
            "" if number == 0 else f"{difference['mean']:+.2f}{_half(difference)}",
            "-" if entry["step_ratio"] is None else f"{entry['step_ratio']:.2f} x",
            "-" if entry["extra_bytes"] is None else _bytes(entry["extra_bytes"]),
        )
    # As wide as it needs to be: a file or a pipe has no width, and a label cut short would name no row.
    natural = Measurement.get(out_console, out_console.options.update_width(1000), table).maximum
    out_console.width = max(out_console.width, natural)
    out_console.print(table, soft_wrap=False)
    if page is not None:
        out_console.print(f"The report, for any browser: {page}", markup=False)
    out_console.print(f"Every seed's numbers: {results}", markup=False)
    out_console.print(verdict(outcome), markup=False)


def _half(interval: dict[str, float]) -> str:
    return "" if math.isnan(interval["half"]) else f" ± {interval['half']:.2f}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning as one line; takes the arguments of ``warnings.showwarning``."""
    err_console.print(f"flatmin: warning: {message}", markup=False)
