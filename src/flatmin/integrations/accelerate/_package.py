"""What of Accelerate is needed, and what is refused of it."""

from ...errors import MissingDependencyError, require

OLDEST = (1, 15)  # with which this was tried


def check_package() -> None:
    """Checks that there is an Accelerate, and that it is not too old.

    Raises:
        MissingDependencyError: Otherwise.
    """
    package = require("accelerate", install="flatmin[accelerate]")
    version = str(package.__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise MissingDependencyError(
            f"accelerate {version} is too old, {'.'.join(map(str, OLDEST))} is needed; "
            "pip install 'flatmin[accelerate]'"
        )
