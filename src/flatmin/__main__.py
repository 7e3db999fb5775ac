"""``python -m flatmin`` and the console script ``flatmin``."""

import sys

from . import _command


def main() -> None:
    """Runs the command; without the packages it needs, says what to install."""
    _command.begin()
    try:
        from .lab import cli
    except ImportError as error:
        _command.ended()
        if error.name is None or error.name.split(".")[0] == "flatmin":
            raise
        print(f"flatmin: the command needs {error.name}; pip install 'flatmin[cli]'", file=sys.stderr)
        _command.leave(2)
    _command.leave(cli.run())


if __name__ == "__main__":
    main()
