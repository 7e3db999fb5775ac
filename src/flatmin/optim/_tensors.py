"""Arithmetic over lists of tensors, in which DTensors and plain ones may be mixed."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_PLAIN = {Tensor, nn.Parameter}


def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together, accumulated in float32 at least, as a scalar.

    DTensors count with all their shards, so that the norm is the same on all ranks.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    widest = max((torch.promote_types(dtype, torch.float32) for dtype in dtypes), key=lambda kind: kind.itemsize)
    norms: list[Tensor] = []
    for (same,) in _alike(tensors):
        some = list(torch._foreach_norm(same, 2, widest))
        if _mesh(same[0]) is not None:
            some = [torch.linalg.vector_norm(torch.stack(some)).full_tensor()]
        norms += some
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.to(tensors[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def add_(tensors: list[Tensor], others: list[Tensor], alpha: float) -> None:
    """``tensors += alpha * others``, in place."""
    for ours, theirs in _alike(tensors, others):
        torch._foreach_add_(ours, theirs, alpha=alpha)


def scale_(tensors: list[Tensor], factor: float) -> None:
    """``tensors *= factor``, in place."""
    for (ours,) in _alike(tensors):
        torch._foreach_mul_(ours, factor)


def multiply_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """``tensors *= others``, in place."""
    for ours, theirs in _alike(tensors, others):
        torch._foreach_mul_(ours, theirs)


def absolute_(tensors: list[Tensor], plus: float) -> None:
    """``tensors = |tensors| + plus``, in place."""
    for (ours,) in _alike(tensors):
        torch._foreach_abs_(ours)
        torch._foreach_add_(ours, plus)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, outside of any graph."""
    return [tensor.detach().clone() for tensor in tensors]


def cosine(tensors: list[Tensor], others: list[Tensor], norm: float, other: float) -> float:
    """Cosine of the angle between two directions over all tensors together; 0 if one of them is none.

    ``1 - |a/|a| - b/|b||^2 / 2``: no tensor at a time, no cancellation where they are nearly parallel, and the rounding
    is that of ``cosine`` itself wherever the lengths lie apart.

    Args:
        tensors: One direction.
        others: The other.
        norm: The norm of ``tensors``.
        other: The norm of ``others``.
    """
    if norm == 0 or other == 0:
        return 0.0
    difference = clones(tensors)
    scale_(difference, 1 / norm)
    add_(difference, others, alpha=-1 / other)
    return 1 - float(global_norm(difference)) ** 2 / 2


def copy_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Copies ``others`` into ``tensors``, each of which is placed like the other."""
    torch._foreach_copy_([_local(tensor) for tensor in tensors], [_local(other) for other in others])


def _alike(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Splits lists in parallel into parts of one dtype and one mesh, which a foreach function can take."""
    if {type(tensor) for tensor in lists[0]} <= _PLAIN and len({tensor.dtype for tensor in lists[0]}) == 1:
        yield list(lists)
        return
    parts: dict[object, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        parts.setdefault((row[0].dtype, _mesh(row[0])), []).append(row)
    for rows in parts.values():
        yield [list(column) for column in zip(*rows, strict=True)]


def _mesh(tensor: Tensor) -> object:
    """The mesh of a DTensor, naming which would take half a second of import; None for a plain tensor."""
    return getattr(tensor, "device_mesh", None)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; a plain tensor is its own."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
