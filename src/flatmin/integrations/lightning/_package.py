"""What of Lightning is needed."""

from ...errors import require


def check_package() -> None:
    """Checks that Lightning is there, in a version with which this was tried.

    Raises:
        MissingDependencyError: Otherwise.
    """
    require("lightning", install="flatmin[lightning]", oldest=(2, 6))
