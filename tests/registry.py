"""What a test registers is gone after it."""

from collections.abc import Iterator
from contextlib import contextmanager

from flatmin.lab.methods import registry


@contextmanager
def restored() -> Iterator[None]:
    """Puts the registry back to what it was."""
    kept = [(mapping, dict(mapping)) for mapping in (registry._methods, registry._origins)]
    try:
        yield
    finally:
        for mapping, before in kept:
            mapping.clear()
            mapping.update(before)
