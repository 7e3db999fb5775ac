"""SAF and MESA inside `torch.compile`: what they remember and count, in operations that the compiler does not open.

The epoch, the checks and the counts stay on the host, where the operation finds them each time it runs. So a compiled
step never goes stale, and is not compiled again when the epoch or the call changes. The loss itself is compiled.
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Remembers(Protocol):
    """What a compiled step calls of SAF."""

    def _remember(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]: ...

    def _like_remembered(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...


class Draws(Protocol):
    """What a compiled step calls of MESA."""

    def _is_due(self) -> bool: ...

    def _draw(self, batch: int) -> Tensor: ...


_known: WeakValueDictionary[int, Any] = WeakValueDictionary()
_handles = itertools.count()


def register(owner: Remembers | Draws) -> int:
    """Returns the number by which a compiled graph finds ``owner``."""
    handle = next(_handles)
    _known[handle] = owner
    return handle


def _remember(logits: Tensor, index: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _known[handle]._remember(logits, index)
    return found


def _like_remembered(logits: Tensor, index: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _known[handle]._like_remembered(logits)
    return found


def _is_due(logits: Tensor, handle: int) -> Tensor:
    return torch.tensor(_known[handle]._is_due(), device="cpu")


def _draw(logits: Tensor, size: int, handle: int) -> Tensor:
    share: Tensor = _known[handle]._draw(len(logits))
    return share


# A CUDA graph would record what it launches once, and replay it with the same epoch and indices. torch 2.6 has no such
# tag, and no tags here.
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
_options: dict[str, Any] = {"mutates_args": (), **({} if _unsafe is None else {"tags": [_unsafe]})}
remember: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = torch.library.custom_op(
    "flatmin::remember", _remember, **_options
)
remember.register_fake(_like_remembered)  # type: ignore[attr-defined]  # of the operation, which is also a function
is_due: Callable[[Tensor, int], Tensor] = torch.library.custom_op("flatmin::is_due", _is_due, **_options)
is_due.register_fake(lambda logits, handle: torch.empty((), dtype=torch.bool, device="cpu"))  # type: ignore[attr-defined]
draw: Callable[[Tensor, int, int], Tensor] = torch.library.custom_op("flatmin::draw", _draw, **_options)
draw.register_fake(lambda logits, size, handle: torch.empty(size, dtype=torch.int64, device="cpu"))  # type: ignore[attr-defined]
