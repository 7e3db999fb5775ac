"""What the command shows: progress, the table of a comparison, warnings."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...errors import FlatminWarning
from ..results import RESULTS, ComparisonResult
from ..results.tables import after_caption, after_table, main_table

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


class _Notices(logging.Handler):
    """Shows the notices of the library, such as choices that it has made."""

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
        """Shows the progress."""
        self._bar.update(self._task, completed=done, total=planned or None, description=word)
        if not err_console.is_terminal and word != self._said:
            self._said = word
            err_console.print(word, markup=False)


def print_result(result: ComparisonResult) -> None:
    """Prints the table of a comparison, where its report and its numbers are, and the verdict as the last line."""
    if result.seeds:
        out_console.print(result.heading(), markup=False)
        print_table(main_table(result.rows))
        if after := after_table(result.rows, len(result.seeds)):
            print_table(after)
            out_console.print(after_caption(result.rows, len(result.seeds)), markup=False)
        if result.page is not None:
            out_console.print(f"The report, for any browser: {result.page}", markup=False)
        if result.folder is not None:
            out_console.print(f"Every seed's numbers: {result.folder / RESULTS}", markup=False)
    out_console.print(result.verdict, markup=False)


def print_table(cells: list[list[str]]) -> None:
    """Prints a table, its headings first."""
    table = Table()
    for number, heading in enumerate(cells[0]):
        table.add_column(escape(heading), justify="right" if number else "left", no_wrap=True)
    for line in cells[1:]:
        table.add_row(*map(escape, line))
    # As wide as it needs to be: a file or a pipe has no width, and a label cut short would name no row.
    natural = Measurement.get(out_console, out_console.options.update_width(1000), table).maximum
    out_console.width = max(out_console.width, natural)
    out_console.print(table, soft_wrap=False)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning as one line; takes the arguments of ``warnings.showwarning``."""
    err_console.print(f"flatmin: warning: {message}", markup=False)
