"""What the commands share: the application, and the end of what Ctrl-C has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..runs.train import RunInterrupted

app = typer.Typer(
    help="Train networks into flat minima at the price of the plain optimizer, and measure what it gains.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


TrustExperiment = Annotated[
    bool,
    typer.Option(
        "--trust-experiment",
        help="Run the experiment file in the run's folder, code of whoever made it, if the one named is gone.",
    ),
]


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, with what was kept."""

    def __str__(self) -> str:
        return f"interrupted: {super().__str__()}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes one line of what Ctrl-C has left; typer would end the command itself on a KeyboardInterrupt."""
    try:
        yield
    except RunInterrupted as error:
        raise Interrupted(str(error)) from None
