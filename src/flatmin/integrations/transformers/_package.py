"""What of transformers is needed."""

from ...errors import require


def check_package() -> None:
    """Checks that transformers is there with accelerate, in a version with which this was tried.

    Raises:
        MissingDependencyError: Otherwise.
    """
    require("transformers", install="flatmin[transformers]", oldest=(5, 24))
    require("accelerate", install="flatmin[transformers]")
