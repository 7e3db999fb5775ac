"""Runs the command: its options, its errors as one line, its exit codes."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from ... import __version__, _command
from ...errors import FlatminError
from ..training import torchrun
from . import _after as _after  # each adds its command
from . import _compare as _compare
from . import _landscape as _landscape
from . import _report as _report
from . import _sharpness as _sharpness
from . import _train as _train
from ._shared import Interrupted, app
from ._terminal import err_console, out_console, speaking


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train networks into flat minima at the price of the plain optimizer, and measure what it gains."""
    if version:
        out_console.print(f"flatmin {__version__}")
    elif context.invoked_subcommand is None:
        out_console.print(context.get_help(), markup=False)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 after one line on what was wrong.

    Args:
        arguments: What follows ``flatmin`` on the command line; None for this process's own.
    """
    # A plain kill ends a run as Ctrl-C does: what was done is kept and said. The first rank speaks for all.
    with _command.commanded(), speaking(quiet=torchrun.rank() > 0):
        try:
            code = typer.main.get_command(app).main(args=arguments, prog_name="flatmin", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except (FlatminError, Interrupted) as error:
            message = str(error)
            if "flatmin.errors." in message:  # from a loader's worker: its traceback, and then what was said
                message = message.rpartition("flatmin.errors.")[2].partition(": ")[2]
        except Exception as error:
            # typer's own usage errors, whatever version of click they come from
            format_message = getattr(error, "format_message", None)
            if format_message is None and torchrun.claim_failure():
                raise
            message = "" if format_message is None else format_message()
        _command.ended()
        # Of several ranks the first to fail says why; what the others meet then is only that it has gone.
        if not torchrun.claim_failure():
            os._exit(2)  # at once: torch would wait for the one that is gone
        err_console.print(f"flatmin: {' '.join(message.split())}", markup=False)
        return 2
