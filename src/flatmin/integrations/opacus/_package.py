"""What of Opacus is needed."""

from ...errors import require


def check_package() -> None:
    """Checks that Opacus is there, in a version with which this was tried.

    Raises:
        MissingDependencyError: Otherwise.
    """
    require("opacus", install="flatmin[opacus]", oldest=(1, 6))
