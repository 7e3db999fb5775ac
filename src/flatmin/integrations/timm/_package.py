"""What of timm is needed; it is imported where it is used, so that presets can be read without it."""

from types import ModuleType

from ...errors import require


def timm(part: str) -> ModuleType:
    """Imports a part of timm, such as ``"task"``.

    Raises:
        MissingDependencyError: If it cannot be imported.
    """
    return require(f"timm.{part}", install="flatmin[timm]")
