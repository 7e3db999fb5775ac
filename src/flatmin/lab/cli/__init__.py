"""The command, a file for each of its words."""

from ._app import run as run

__all__ = ["run"]
