"""What of transformers is needed."""

from ...errors import MissingDependencyError, require

OLDEST = (5, 24)  # with which this was tried


def check_package() -> None:
    """Checks that transformers is there with accelerate, and that it is not too old.

    Raises:
        MissingDependencyError: Otherwise.
    """
    package = require("transformers", install="flatmin[transformers]")
    require("accelerate", install="flatmin[transformers]")
    version = str(package.__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise MissingDependencyError(
            f"transformers {version} is too old, {'.'.join(map(str, OLDEST))} is needed; "
            "pip install 'flatmin[transformers]'"
        )
