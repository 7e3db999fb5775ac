"""What the commands share: the application, and what they say of a run that ends early or never begins to act."""

import warnings
from collections.abc import Mapping
from typing import Any

import typer

from ...errors import FlatminWarning

app = typer.Typer(
    help="Train networks into flat minima at the price of the plain optimizer, and measure what it gains.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, with what was kept."""

    def __str__(self) -> str:
        return f"interrupted: {super().__str__()}"


def warn_if_idle(label: str, settings: Mapping[str, Any], epochs: int) -> None:
    first = max(settings.get("start_epoch", 0), settings.get("lag", 0))
    if first >= epochs:
        warnings.warn(
            f"{label}: the trajectory loss would begin in epoch {first}, from 0, and there are {epochs} epochs, "
            "so it never acts: train longer, or lower start_epoch and lag",
            FlatminWarning,
            stacklevel=2,
        )
