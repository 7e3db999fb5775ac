"""What of Lightning is needed, and what is refused of it."""

from ...errors import MissingDependencyError, require

OLDEST = (2, 6)  # with which this was tried


def check_package() -> None:
    """Checks that there is a Lightning, and that it is not too old.

    Raises:
        MissingDependencyError: Otherwise.
    """
    package = require("lightning", install="flatmin[lightning]")
    version = str(package.__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise MissingDependencyError(
            f"lightning {version} is too old, {'.'.join(map(str, OLDEST))} is needed; pip install 'flatmin[lightning]'"
        )
