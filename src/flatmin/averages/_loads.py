"""Notices where weights of a network, or of a part of it, were loaded, and the state of its average was not."""

import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .._distributed import local, unwrapped
from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._layers import named_parameters


class Loads:
    """What has been loaded since an average was made or last updated.

    Weights that are put back are no others, and nor are the average's own: a loop may load them into the network, to
    evaluate it or to go on from there.

    Args:
        network: Whose weights are averaged, in its wrappers or not.
    """

    def __init__(self, network: nn.Module) -> None:
        self._before: list[float] | None = None  # the weights before the first load, each tensor's sum
        self._loaded: list[float] | None = None  # what the network got, if others since, and the average was not loaded
        self._settled = False  # whether it was
        self._warned = False
        self._follow(network)

    def settle(self) -> None:
        """The average's own state was loaded, or it is said otherwise that it was not."""
        self._loaded, self._settled = None, True

    def check(self, network: nn.Module, average: nn.Module, owner: nn.Module) -> None:
        """Warns once where an average is about to go on from other weights than those of its network.

        Args:
            network: Whose weights are averaged.
            average: The averaged network.
            owner: What the user made, and is named.
        """
        loaded, self._before, self._loaded, self._settled = self._loaded, None, None, False
        self._follow(network)  # which in a copy is another one
        if loaded is not None and not self._warned and loaded != _sums(average):
            self._warned = True
            name = type(owner).__name__
            warnings.warn(
                f"the network's weights were loaded after this {name} was made or last updated, and {name}'s own state "
                f"was not, so that its average is that of other weights: attach it to the optimizer before a "
                "checkpoint is loaded, which then has it, or load what its state_dict() returned; to begin anew, make "
                f"{name} after the weights are loaded (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )

    def before(self, network: nn.Module) -> None:
        """Before weights are loaded."""
        if self._before is None:
            self._before = _sums(network)

    def after(self, network: nn.Module) -> None:
        """After it."""
        now = _sums(network)
        self._loaded = None if self._settled or self._before == now else now

    def _follow(self, network: nn.Module) -> None:
        network = unwrapped(network)
        if network not in _registry:
            _registry[network] = weakref.WeakSet()
            for module in network.modules():
                if module not in _networks:
                    _networks[module] = weakref.WeakSet()
                    module.register_load_state_dict_pre_hook(_before)  # type: ignore[no-untyped-call]
                    module.register_load_state_dict_post_hook(_after)  # type: ignore[no-untyped-call]
                _networks[module].add(network)
        _registry[network].add(self)


_registry: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Loads]]" = weakref.WeakKeyDictionary()
_networks: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]" = weakref.WeakKeyDictionary()  # by parts
_alone: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # modules that are being loaded, and not as parts of others


class _Hook:
    """On each module of a network; in a copy or a pickle of it a function that does nothing, of Python's own."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *given: Any) -> None:
        self._call(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (sys.audit, "flatmin.copied")


def _begin(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    if not prefix:
        _alone.add(module)
    for network, loads in _followers(module):
        loads.before(network)


def _end(module: nn.Module, *_: Any) -> None:
    for network, loads in _followers(module):
        loads.after(network)
    _alone.discard(module)


def _followers(module: nn.Module) -> list[tuple[nn.Module, Loads]]:
    """Who follows a network of which ``module`` is the whole, or a part that is loaded alone."""
    networks = [each for each in _networks.get(module, ()) if each is module or module in _alone]
    return [(network, loads) for network in networks for loads in list(_registry.get(network, ()))]


_before, _after = _Hook(_begin), _Hook(_end)


@torch.no_grad()
def _sums(network: nn.Module) -> list[float]:
    found = (local(parameter) for _, parameter in named_parameters(network))
    return [float(each.double().sum()) for each in found if each.is_floating_point() and not each.is_meta]
