"""Reads what there is and writes the page, and if asked the figures and TensorBoard's files."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path

from ..._files import read_bytes, write_whole
from ..._interrupts import held
from ...errors import DataError, InvalidArgumentError, OutputError
from ..results.files import check_path
from ._page import MARK, make_page, make_section
from ._read import read_studies
from ._static import draw
from ._tensorboard import write_events


def write_report(sources: Sequence[str | PathLike[str]], out: str | PathLike[str] | None = None) -> Path:
    """Writes one self-contained HTML page on comparisons and runs.

    Args:
        sources: Folders that ``flatmin compare`` or ``flatmin train`` wrote, or results files of comparisons. Single
            runs on the same data and network are shown together.
        out: The page's file; None for ``report.html`` in the first folder, or beside a file under its name.

    Returns:
        Where the page is.

    Raises:
        InvalidArgumentError: If there are no sources.
        DataError: If one is missing, empty, damaged or not flatmin's.
        OutputError: If the page cannot be written, or something that is no report is there.
        MissingDependencyError: If Plotly is not installed.
    """
    if not sources:
        raise InvalidArgumentError("sources is empty: give the folder of a comparison or of a run")
    if out is not None:
        check_path("out", out)
    studies = read_studies([Path(source) for source in sources])
    page = page_of(sources, out)
    check_ours(page)
    write_ours(page, make_page([make_section(study) for study in studies], version("flatmin")).encode())
    return page


def page_of(sources: Sequence[str | PathLike[str]], out: str | PathLike[str] | None = None) -> Path:
    """Where `write_report` writes its page."""
    if out is not None:
        return Path(out)
    first = Path(sources[0])
    return first / "report.html" if first.is_dir() else first.with_suffix(".html")


def write_figures(sources: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> list[Path]:
    """Writes every plot of the page as SVG and PNG into ``folder``; of landscapes the maps.

    Args:
        sources: As for `write_report`.
        folder: Where to; made if it is not there. Several comparisons number their files.

    Returns:
        The files.

    Raises:
        DataError: As in `write_report`.
        OutputError: If one cannot be written, or something else has its name.
        MissingDependencyError: If matplotlib is not installed.
    """
    check_path("figures", folder)
    studies = read_studies([Path(source) for source in sources])
    written = []
    for number, study in enumerate(studies, start=1):
        for chart in make_section(study).charts:
            name = chart.key if len(studies) == 1 else f"{number}-{chart.key}"
            for ending, content in draw(chart, MARK).items():
                written.append(Path(folder) / f"{name}.{ending}")
                write_ours(written[-1], content)
    return written


def write_tensorboard(sources: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> list[Path]:
    """Writes what the runs logged as TensorBoard's scalars into ``folder``, a run of its own for each row and seed.

    Args:
        sources: As for `write_report`.
        folder: Where to; made if it is not there. What this function wrote there before is replaced.

    Returns:
        The runs' folders.

    Raises:
        DataError: As in `write_report`, and if no run has logged anything.
        OutputError: If they cannot be written.
        MissingDependencyError: If TensorBoard is not installed.
    """
    check_path("tensorboard", folder)
    written = write_events(read_studies([Path(source) for source in sources]), Path(folder))
    if not written:
        raise DataError(f"{sources[0]}: holds no run's metrics.jsonl, so there is nothing for TensorBoard")
    return written


def check_ours(path: Path) -> None:
    """Checks that ``path`` is free, or holds what this module wrote before.

    Raises:
        OutputError: If it holds something else.
    """
    if path.is_dir() and not path.is_symlink():
        raise OutputError(f"{path}: is a folder; name a file in it")
    try:
        foreign = os.path.lexists(path) and MARK.encode() not in read_bytes(path)
    except DataError as error:
        raise OutputError(f"{error}; give another name") from error
    if foreign:
        raise OutputError(f"{path}: is there already and was not written by flatmin report; give another name")


@held()
def write_ours(path: Path, content: bytes) -> None:
    """Writes a file in one piece, and the folders that it needs.

    Raises:
        OutputError: If it cannot be written; what was there before stays.
    """
    check_ours(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    write_whole(path, content)
