"""``python -m flatmin`` and the console script ``flatmin``."""

import sys


def main() -> None:
    """Runs the command; without the packages it needs, says what to install."""
    try:
        from .lab import cli
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] == "flatmin":
            raise
        print(f"flatmin: the command needs {error.name}; pip install 'flatmin[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("flatmin: interrupted before anything was done", file=sys.stderr)
        sys.exit(2)
    sys.exit(cli.run())


if __name__ == "__main__":
    main()
