"""Which tensor of an average belongs to which of the network, by name, and what becomes of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .._distributed import local, unwrapped
from ..errors import InvalidArgumentError
from ._layers import layers, named_buffers, named_layers, named_parameters
from ._statistics import BUFFERS

# Names of wrappers that may be put around a layer after the average was made: torch.compile, activation checkpointing.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


class Kind(Enum):
    """What an average does with a tensor."""

    WEIGHTS = "averaged"
    STATISTICS = "averaged, or made anew"
    STATE = "averaged where the result is finite, copied elsewhere"  # other floating buffers, frozen parameters
    COPIED = "copied"  # integers, masks of pruning, buffers of parametrizations
    VECTORS = "its own"  # u and v of spectral norm, which fit one network's weights alone


@dataclass(frozen=True)
class Pair:
    """A tensor of the average and the network's of the same name; of DTensors this rank's shards."""

    name: str
    ours: Tensor
    theirs: Tensor
    kind: Kind


PLAIN = {Tensor, nn.Parameter}
Match = tuple[str, Tensor, Tensor, Kind]


@dataclass(frozen=True)
class Found:
    """What was found for an average when its tensors and the network's were last other than before."""

    signature: list[Any]
    matches: list[Match]
    pairs: list[Pair] | None  # None where some are no plain tensors: the shards of DTensors are looked at anew


FOUND: "WeakKeyDictionary[nn.Module, Found]" = WeakKeyDictionary()


def pairs(network: nn.Module, model: nn.Module, *, follow: bool = True) -> list[Pair]:
    """Returns the tensors of an average with those of the network, wrapped or not, that have the same names.

    Args:
        network: The average.
        model: The network.
        follow: Whether the average takes over buffers that the network has made, resized or dropped since; otherwise
            they are left out.

    Raises:
        InvalidArgumentError: If the parameters are not the same, or have other shapes.
    """
    model = unwrapped(model)
    known = FOUND.get(network)
    if known is None or known.signature != _signature(network, model):
        if follow:
            _follow(network, model)
        matches = list(_matches(network, model))
        plain = all(type(tensor) in PLAIN for _, a, b, _ in matches for tensor in (a, b))
        known = Found(_signature(network, model), matches, _pairs(matches) if plain else None)
        if follow:
            FOUND[network] = known
    return _pairs(known.matches) if known.pairs is None else known.pairs


def _pairs(matches: list[Match]) -> list[Pair]:
    return [Pair(name, local(a.detach()), local(b.detach()), kind) for name, a, b, kind in matches]


def _signature(network: nn.Module, model: nn.Module) -> list[Any]:
    """What is as before if the tensors are, in the same order, of the same shapes and in the same memory."""
    found = [
        each
        for top in (network, model)
        for layer in layers(top)
        for kind in (layer._parameters, layer._buffers)
        if kind
        for each in kind.values()
        if each is not None
    ]
    places = [each.data_ptr() if type(each) in PLAIN else 0 for each in found]
    return [*map(id, found), *places, *[each.requires_grad for each in found], *[each.shape for each in found]]


def _matches(network: nn.Module, model: nn.Module) -> Iterator[Match]:
    ours, theirs = _named(network), _named(model, every=True)
    buffers = {name for name, _ in named_buffers(network)}
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None and name not in buffers:
            raise InvalidArgumentError(
                f"model has no parameter {name!r}, which its average has: make the average anew where layers are "
                "taken out, put in or renamed"
            )
        if other is None or local(tensor).shape != local(other).shape:
            if name in buffers:
                continue
            raise InvalidArgumentError(
                f"model has tensors of other shapes than its average ({name!r} for one); if model is sharded, call "
                "fully_shard(average.module) in the same way, after the average was made"
            )
        yield name, tensor, other, _kind(name, tensor, name in buffers or not other.requires_grad, theirs)
    _refuse_new(network, theirs, model)


def _kind(name: str, tensor: Tensor, frozen: bool, names: dict[str, Tensor]) -> Kind:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Kind.COPIED
    if not frozen:
        return Kind.WEIGHTS
    path, _, leaf = name.rpartition(".")
    if leaf in BUFFERS:
        return Kind.STATISTICS
    weight, _, suffix = name.rpartition("_")
    parametrization = "parametrizations" in path.split(".")
    if (suffix in ("mask", "u", "v") and f"{weight}_orig" in names) or parametrization:  # .prune, .spectral_norm
        vector = suffix in ("u", "v") and (not parametrization or leaf in ("_u", "_v"))
        return Kind.VECTORS if vector and not any(hasattr(each, "to_local") for each in names.values()) else Kind.COPIED
    return Kind.STATE


def _named(network: nn.Module, *, every: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by name; ``every`` lists those that are shared under each of their names."""
    found: Iterator[tuple[str, Tensor]] = chain(
        named_parameters(network, every=every), named_buffers(network, every=every)
    )
    return {_clean(name): tensor for name, tensor in found}


def _clean(name: str) -> str:
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _follow(network: nn.Module, model: nn.Module) -> None:
    """Gives ``network`` the buffers that ``model`` has made or resized since it was copied, and drops the others."""
    ours = dict(named_buffers(network, every=True))
    theirs = dict(named_buffers(model, every=True))
    shapes = {_clean(name): buffer.shape for name, buffer in theirs.items()}
    if shapes == {_clean(name): buffer.shape for name, buffer in ours.items()}:
        return
    found = {_clean(name): layer for name, layer in named_layers(network)}
    for raw, buffer in theirs.items():
        path, _, leaf = _clean(raw).rpartition(".")
        if path not in found:
            raise InvalidArgumentError(
                f"model has a buffer {raw!r} in a layer that its average lacks: make the average anew where layers "
                "are taken out, put in or renamed"
            )
        mine = found[path]._buffers.get(leaf)
        if mine is None or mine.shape != buffer.shape:
            copy = buffer.detach().clone() if mine is None else buffer.detach().to(mine, copy=True)
            persistent = leaf not in model.get_submodule(raw.rpartition(".")[0])._non_persistent_buffers_set
            found[path].register_buffer(leaf, copy, persistent)
    for raw in ours:
        if _clean(raw) not in shapes:
            path, _, leaf = raw.rpartition(".")
            network.get_submodule(path)._buffers[leaf] = None


def _refuse_new(network: nn.Module, theirs: dict[str, Tensor], model: nn.Module) -> None:
    """Raises `InvalidArgumentError` if the model has a parameter that its average lacks."""
    parameters = {_clean(name) for name, _ in named_parameters(model, every=True)}
    if new := sorted(parameters - set(_named(network, every=True))):
        raise InvalidArgumentError(
            f"model has a parameter {new[0]!r}, which its average lacks: make the average anew where layers are taken "
            "out, put in or renamed"
        )
