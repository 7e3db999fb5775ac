"""What the commands share: the application, and the end of what Ctrl-C has ended."""

import typer

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
