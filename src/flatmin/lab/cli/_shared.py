"""What the commands share: the application, and the end of what Ctrl-C has ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ... import _command
from ..runs.train import RunInterrupted


class _Group(TyperGroup):
    """The command; typer itself would end on a KeyboardInterrupt without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("nothing was done") from None


app = typer.Typer(
    cls=_Group,
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
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """The work of a command: before it a signal ends the process, after it a signal has no effect.

    Args:
        kept: Says what was kept, where the work itself does not.
    """
    try:
        _command.working()
        yield
        return
    except RunInterrupted as error:
        said = str(error)
    except KeyboardInterrupt:
        said = kept()
    finally:
        _command.ended()
    raise Interrupted(said)


def state_of(path: Path) -> Callable[[], str]:
    """Says later whether ``path`` has been written since."""

    def identity() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    before = identity()

    def say() -> str:
        now = identity()
        if now != before:
            return f"{path} is written"
        return "nothing was written" if now is None else f"nothing was written, {path} is as it was"

    return say
