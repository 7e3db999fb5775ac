"""Arithmetic over lists of tensors, in which DTensors and plain ones may be mixed.

A number that is computed of tensors is a float where they are on the CPU. Where they are on an accelerator it stays
there, as a tensor without dimensions, so that the host does not wait for it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import local

Scalar = float | Tensor  # a number, or a tensor without dimensions on the device of what it is for

_PLAIN = {Tensor, nn.Parameter}
_READ = ("cpu", "mps", "meta")  # devices whose numbers are read at once: mps has no float64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stays(tensors: list[Tensor]) -> bool:
    """Whether numbers of these tensors stay on their device: if it is one, and the host would wait for it."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type not in _READ


def global_norm(tensors: list[Tensor], least: torch.dtype = torch.float32) -> Tensor:
    """L2 norm over all tensors together, accumulated in ``least`` at least, as a scalar.

    DTensors count with all their shards, so that the norm is the same on all ranks.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if any(dtype.is_complex for dtype in dtypes):
        return global_norm([torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors], least)
    widest = max((torch.promote_types(dtype, least) for dtype in dtypes), key=lambda kind: kind.itemsize)
    norms: list[Tensor] = []
    for (same,) in _alike(tensors):
        if _mesh(same[0]) is None:
            norms += torch._foreach_norm(same, 2, widest)
        else:
            norms += _norms_of_sharded(same, widest)
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.to(tensors[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _norms_of_sharded(tensors: list[Any], dtype: torch.dtype) -> Iterator[Tensor]:
    """Norms of DTensors of one mesh, of those that are placed alike together; the same on all ranks.

    Computed of the shards: in torch 2.14 ``_foreach_norm`` takes DTensors, and another dtype, but not both.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate  # slow where nobody has it yet

    placed: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        places = tuple(Replicate() if place.is_partial() else place for place in tensor.placements)
        whole = tensor if places == tensor.placements else tensor.redistribute(placements=places)
        placed.setdefault(places, []).append(local(whole))
    for places, shards in placed.items():
        square = torch.stack(list(torch._foreach_norm(shards, 2, dtype))).square().sum()
        kinds = [place if place.is_replicate() else Partial() for place in places]
        yield DTensor.from_local(square, tensors[0].device_mesh, kinds, run_check=False).full_tensor().sqrt()


def length(tensors: list[Tensor]) -> Scalar:
    """`global_norm`, finite wherever the tensors are: their squares may overflow float32."""
    if stays(tensors):
        return global_norm(tensors, torch.float64)
    norm = float(global_norm(tensors))
    return norm if norm < math.inf else float(scaled_norm(tensors))


def scaled_norm(tensors: list[Tensor]) -> Tensor:
    """`global_norm` for where squares overflow: of all tensors times one small number, and divided by it in float64."""
    double = {torch.float64, torch.complex128} & {tensor.dtype for tensor in tensors}
    small = 2.0**-600 if double else 2.0**-80  # elements that it makes 0 do not count beside those that overflow
    norm = global_norm([tensor * small for tensor in tensors])
    return (norm.cpu() if norm.device.type == "mps" else norm).double() / small  # mps has no float64


def add_(tensors: list[Tensor], others: list[Tensor], alpha: Scalar) -> None:
    """``tensors += alpha * others``, in place."""
    for ours, theirs in _alike(tensors, others):
        terms, factor = _term(theirs, alpha)
        torch._foreach_add_(_plain(ours, alpha), terms, alpha=factor)


def scale_(tensors: list[Tensor], factor: Scalar) -> None:
    """``tensors *= factor``, in place."""
    for (ours,) in _alike(tensors):
        if not isinstance(factor, Tensor):
            torch._foreach_mul_(ours, factor)
        elif ours[0].dtype.itemsize <= 2:
            torch._foreach_copy_(_plain(ours, factor), _scaled(ours, factor))
        else:
            torch._foreach_mul_(_plain(ours, factor), factor.to(ours[0].dtype))


def shorten_(tensors: list[Tensor], most: float) -> None:
    """Scales the tensors, in place, to a norm of ``most`` over all of them where it is longer, as torch clips."""
    factor = most / (length(tensors) + 1e-6)
    if isinstance(factor, Tensor):
        scale_(tensors, factor.clamp(max=1.0))
    elif factor < 1:
        scale_(tensors, factor)


def multiply_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """``tensors *= others``, in place."""
    for ours, theirs in _alike(tensors, others):
        torch._foreach_mul_(ours, theirs)


def plus(tensors: list[Tensor], others: list[Tensor], alpha: Scalar) -> list[Tensor]:
    """``tensors + alpha * others``."""
    if isinstance(alpha, Tensor) and not {type(each) for each in tensors} <= _PLAIN:
        found = clones(tensors)
        add_(found, others, alpha)
        return found

    def added(ours: list[Tensor], theirs: list[Tensor]) -> Any:
        terms, factor = _term(theirs, alpha)
        if isinstance(alpha, Tensor):  # nobody else has the terms
            torch._foreach_add_(terms, ours)
            return terms
        return torch._foreach_add(ours, terms, alpha=factor)

    return _made(added, tensors, others)


def blend(tensors: list[Tensor], others: list[Tensor], share: float) -> list[Tensor]:
    """``tensors + share * (others - tensors)``."""
    return _made(lambda ours, theirs: torch._foreach_lerp(ours, theirs, share), tensors, others)


def times(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """``tensors * others``."""
    return _made(torch._foreach_mul, tensors, others)


def absolute(tensors: list[Tensor], eta: float) -> list[Tensor]:
    """``|tensors| + eta``."""
    found = _made(torch._foreach_abs, tensors)
    for (ours,) in _alike(found):
        torch._foreach_add_(ours, eta)
    return found


@torch.no_grad()
def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each."""
    at_once = getattr(torch, "_foreach_clone", None)  # of torch 2.12 and later
    if at_once is not None and tensors and {type(tensor) for tensor in tensors} <= _PLAIN:
        return list(at_once(tensors))
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_(copies, tensors)
    return copies


def component(tensors: list[Tensor], others: list[Tensor], norm: Scalar, other: Scalar) -> Scalar:
    """``a . b / |b|^2`` of two directions over all tensors together: how much of ``b`` is in ``a``; 0 if one is none.

    Of the cosine, ``1 - |a/|a| - b/|b||^2 / 2``: no tensor at a time, no cancellation where they are nearly parallel,
    and the rounding is that of ``a . b`` itself wherever the lengths lie apart.

    Args:
        tensors: One direction.
        others: The other.
        norm: The norm of ``tensors``.
        other: The norm of ``others``.
    """
    if isinstance(norm, Tensor) or isinstance(other, Tensor):
        found: Any = _component(tensors, others, norm, other)
        none: Any = (norm == 0) | (other == 0)
        return torch.where(none, 0.0, found)
    return 0.0 if norm == 0 or other == 0 else _component(tensors, others, norm, other)


def _component(tensors: list[Tensor], others: list[Tensor], norm: Scalar, other: Scalar) -> Scalar:
    difference = plus(tensors, others, alpha=-norm / other)  # |a| times that of the unit vectors
    return (1 - (length(difference) / norm) ** 2 / 2) * norm / other


def copy_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Copies ``others`` into ``tensors``, each of which is placed like the other."""
    if tensors:
        torch._foreach_copy_([local(tensor) for tensor in tensors], [local(other) for other in others])


class Backup:
    """Copies of tensors, to be put back where a flag on their device is True, in place and bit-identical.

    Of their bits, as integers: of NaN and infinity, torch's arithmetic over lists would leave something. To look at a
    tensor as integers takes the host long, so that it is done once.
    """

    @torch.no_grad()
    def __init__(self, tensors: list[Tensor]) -> None:
        parts: dict[torch.dtype, list[Tensor]] = {}
        for bits in map(_bits, tensors):
            parts.setdefault(bits.dtype, []).append(bits)
        self._parts = [(part, list(torch._foreach_mul(part, 1))) for part in parts.values()]

    @torch.no_grad()
    def put_back_(self, where: Tensor) -> None:
        """Puts them back where ``where`` is True, and uses the copies up."""
        for new, old in self._parts:
            torch._foreach_sub_(old, new)
            _add_where_(new, old, where)


@torch.no_grad()
def put_back_(tensors: list[Tensor], copies: list[Tensor], where: Tensor) -> None:
    """``tensors = copies`` where a flag on their device is True, see `Backup`."""
    parts: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, copy in zip(tensors, copies, strict=True):
        ours = _bits(tensor)
        new, old = parts.setdefault(ours.dtype, ([], []))
        new.append(ours)
        old.append(_bits(copy))
    for new, old in parts.values():
        _add_where_(new, list(torch._foreach_sub(old, new)), where)


def _add_where_(integers: list[Tensor], differences: list[Tensor], where: Tensor) -> None:
    """Adds differences, which wrapped around and so do back."""
    torch._foreach_mul_(differences, where.to(integers[0].dtype))
    torch._foreach_add_(integers, differences)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, in the same memory."""
    plain = local(tensor)
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.view(_BITS[plain.itemsize])


def _plain(tensors: list[Tensor], factor: Scalar) -> list[Tensor]:
    """The tensors as what a factor on the device can be multiplied with: of DTensors the shards."""
    return [local(tensor) for tensor in tensors] if isinstance(factor, Tensor) else tensors


def _scaled(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """``factor * tensors``, of one dtype; torch is fast where the factor has it, in which 16 bits would be too few."""
    plain, kind = _plain(tensors, factor), tensors[0].dtype
    if kind.itemsize <= 2:
        factor = factor.float()
        return [(factor * tensor.float()).to(kind) for tensor in plain]
    return list(torch._foreach_mul(plain, factor.to(kind)))


def _term(tensors: list[Tensor], alpha: Scalar) -> tuple[list[Tensor], float]:
    """``alpha * tensors``, of one dtype, as tensors and a factor that torch takes: in float16 none that overflows."""
    if isinstance(alpha, Tensor):
        return _scaled(tensors, alpha), 1.0
    if tensors[0].dtype != torch.float16 or abs(alpha) <= torch.finfo(torch.float16).max:
        return tensors, alpha
    return [(alpha * tensor.float()).half() for tensor in tensors], 1.0


def _made(function: Callable[..., Any], *lists: list[Tensor]) -> list[Tensor]:
    """What a foreach function makes of lists in parallel, in their order."""
    parts = [(part[0], function(*part)) for part in _alike(*lists)]
    if len(parts) == 1:
        return list(parts[0][1])
    known = {tensor: new for ours, found in parts for tensor, new in zip(ours, found, strict=True)}
    return [known[tensor] for tensor in lists[0]]


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
