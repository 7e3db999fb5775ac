"""``flatmin report``."""

from typing import Annotated

import typer

from ..report import write_figures, write_report, write_tensorboard
from ..report._write import page_of
from ..results.files import check_path
from ..results.values import count_of
from ._shared import app, interruptible, state_of
from ._terminal import out_console


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of comparisons or of single runs, or results.json files.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="The page's file.  [default: report.html in the first folder]")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Also write each plot as SVG and PNG, for a paper, into this folder.")
    ] = None,
    tensorboard: Annotated[
        str | None, typer.Option(help="Also write what runs logged into this folder, for TensorBoard.")
    ] = None,
) -> None:
    """Write one page on what was found, for a browser without a network.

    It shows the verdict, accuracy against cost, paired differences, curves by epoch, loss landscapes, Hessian spectra,
    measures of sharpness, memory, and how everything was made, each plot with its numbers.
    """
    paths = [*(("runs", run) for run in runs), ("out", out), ("figures", figures), ("tensorboard", tensorboard)]
    for name, value in paths:  # before anything is written
        if value is not None:
            check_path(name, value)
    with interruptible(state_of(page_of(runs, out))):
        page = write_report(runs, out)
        if figures is not None:
            count = len(write_figures(runs, figures))
            out_console.print(f"{count} files with figures: {figures}", markup=False)
        if tensorboard is not None:
            count = len(write_tensorboard(runs, tensorboard))
            out_console.print(f"{count_of(count, 'run')} for tensorboard --logdir {tensorboard}", markup=False)
    out_console.print(f"The report, for any browser: {page}", markup=False)
