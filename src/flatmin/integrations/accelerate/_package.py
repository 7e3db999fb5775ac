"""What of Accelerate is needed."""

from ...errors import require


def check_package() -> None:
    """Checks that Accelerate is there, in a version with which this was tried.

    Raises:
        MissingDependencyError: Otherwise.
    """
    require("accelerate", install="flatmin[accelerate]", oldest=(1, 15))
