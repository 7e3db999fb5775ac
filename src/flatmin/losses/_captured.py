"""MESA's average as a recorded CUDA graph, which runs beside the network: launched at once, and before it if asked.

A graph repeats kernels at fixed addresses. So the average's tensors must be where they were, inputs are copied to where
the graph reads them, and outputs from where it writes them; nothing of the average's Python is run again.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._walk import Walk
from .._warn import depth_in_package
from ..averages._layers import layers
from ..errors import FlatminWarning
from ._rehearsal import CannotRecordError, described, recorded
from ._share import take
from ._side import PLAIN, SIDES, Side
from ._target import Target

AFTER = 3  # a batch of the same shapes is recorded when it comes for this time
DIFFERENT = 16  # shapes of batches that come as often before it is given up
MOST = 8  # recordings

Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a network is called with


@dataclass(frozen=True)
class Started:
    """A pass that was launched.

    Attributes:
        side: Where it runs.
        mark: When it is done.
        outputs: What it returns: tensors and all else, and how they stand together.
        used: The average's tensors, and their versions then.
    """

    side: Side
    mark: Any
    outputs: tuple[list[Any], Any]
    used: "Versions"

    def result(self) -> Any:
        """What the average has returned, for which the current stream waits, and not the host."""
        leaves, spec = self.outputs
        self.side.join(self.mark, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return tree_unflatten(leaves, spec)


class Versions:
    """Notices whether tensors have been written to."""

    def __init__(self, leaves: list[Any]) -> None:
        self._leaves = leaves
        self._versions = _versions(leaves)

    def are(self, leaves: list[Any]) -> bool:
        """Whether these are the same, with the same values."""
        alike = len(leaves) == len(self._leaves) and all(
            a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
            for a, b in zip(leaves, self._leaves, strict=True)
        )
        return alike and self.last()

    def last(self) -> bool:
        """Whether none has been written to."""
        return _versions(self._leaves) == self._versions


@dataclass(frozen=True)
class _Ahead:
    """A pass that was started before the network's: which, of what."""

    number: tuple[int, int]
    precision: torch.dtype | None
    given: Versions
    started: Started


@dataclass(frozen=True)
class _Graph:
    """A recorded pass, with the memory that it uses."""

    signature: tuple[Any, ...]
    inputs: list[Any]
    alive: list[Tensor]
    replay: Callable[[], None]
    outputs: tuple[list[Any], Any]


class Captured:
    """Launches passes of an average as graphs, one for each signature of inputs that comes often enough.

    Where nothing can be recorded, passes are run as ever, with a warning that says why. A copy records anew.
    """

    def __init__(self) -> None:
        self._why = ""  # nothing more is recorded
        self._side: Side | None = None
        self._graphs: list[_Graph] = []
        self._seen: list[tuple[Any, ...]] = []
        self._recordings = 0
        self._walk: Walk | None = None
        self._known: list[int] = []  # of the average, when the graphs were recorded
        self._ahead: _Ahead | None = None
        self._warned = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def prepare(self, target: Target, number: tuple[int, int], given: Given) -> None:
        """Starts a pass that `start` will be asked for, if it can be launched.

        Args:
            target: The average, and how it is run.
            number: The call's own, and the size of the batch, of which a fraction is taken.
            given: What the network is called with.
        """
        self._ahead = None
        if (started := self._launch(target, number, given)) is not None:
            leaves, _ = tree_flatten(given)
            self._ahead = _Ahead(number, target.precision(), Versions(leaves), started)

    def start(self, target: Target, number: tuple[int, int], given: Given) -> Started | None:
        """Launches a pass, or takes the one that was started; None if it is to be run as ever."""
        ahead, self._ahead = self._ahead, None
        unchanged = ahead is not None and ahead.started.used.last() and self._look(target)[1] == self._known
        if ahead is not None and unchanged and ahead.number[0] == number[0]:
            alike = (target.fraction == 1 or ahead.number == number) and ahead.precision == target.precision()
            if alike and ahead.given.are(tree_flatten(given)[0]):
                return ahead.started
            self._warn_of_preparation()
        return self._launch(target, number, given)

    def _launch(self, target: Target, number: tuple[int, int], given: Given) -> Started | None:
        if self._why and not self._graphs:
            return None
        if self._side is None:
            self._side = SIDES[target.device.type](target.device)
        if self._side.busy():
            return None
        with torch.no_grad():
            if (share := target.share(number)) is not None:
                given = take(given, share, number[1])
            used, now = self._look(target)
            self._follow(self._side, now)
            try:
                return self._replayed(self._side, target, given, used)
            except CannotRecordError as error:
                self._why = str(error)
                self._warn_of_fallback(target)
                return None

    def _replayed(self, side: Side, target: Target, given: Given, used: list[Tensor]) -> Started | None:
        leaves, spec = tree_flatten(given)
        signature = (spec, target.statistics, target.precision(), *map(described, leaves))
        graph = next((graph for graph in self._graphs if graph.signature == signature), None)
        if graph is None and (graph := self._recorded(side, target, signature, leaves, used)) is None:
            return None
        inputs = [(ours, leaf) for ours, leaf in zip(graph.inputs, leaves, strict=True) if isinstance(leaf, Tensor)]
        kept = [leaf for leaf in graph.outputs[0] if isinstance(leaf, Tensor)]
        made = side.empty_like(kept)  # the graph's own are written to again, perhaps before the backward pass

        def work() -> None:
            for ours, leaf in inputs:
                ours.copy_(leaf)
            graph.replay()
            for theirs, ours in zip(made, kept, strict=True):
                theirs.copy_(ours)

        mark, fresh = side.launch(work, [leaf for _, leaf in inputs]), iter(made)
        outputs = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in graph.outputs[0]]
        return Started(side, mark, (outputs, graph.outputs[1]), Versions(used))

    def _recorded(
        self, side: Side, target: Target, signature: tuple[Any, ...], leaves: list[Any], used: list[Tensor]
    ) -> _Graph | None:
        """A new graph, if it is time for one."""
        if self._why:
            return None
        self._seen.append(signature)
        if self._seen.count(signature) < AFTER:
            if len(self._seen) > AFTER * DIFFERENT:
                raise CannotRecordError("its inputs come in ever new shapes")
            return None
        if self._recordings == MOST:
            raise CannotRecordError("its inputs come in many shapes, or its weights are replaced again and again")
        self._recordings += 1
        inputs, alive, replay, outputs = recorded(side, target, signature[0], leaves, used)
        self._graphs.append(_Graph(signature, inputs, alive, replay, tree_flatten(outputs)))
        return self._graphs[-1]

    def _look(self, target: Target) -> tuple[list[Tensor], list[int]]:
        """The average's tensors; and what is as before if they, its hooks and where they are in memory are."""
        network = target.networks[0]
        if self._walk is None or self._walk.network is not network:
            self._walk = Walk(network, layers)
        found = self._walk.modules()
        kinds = (kind for layer in found for kind in (layer._parameters, layer._buffers))
        used = [tensor for kind in kinds for tensor in kind.values() if tensor is not None]
        hooks = sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in (target.average, *found))
        return used, [hooks, *map(id, used), *(each.data_ptr() for each in used if type(each) in PLAIN)]

    def _follow(self, side: Side, now: list[int]) -> None:
        """Forgets all graphs if what they were recorded of is other than before."""
        if now != self._known:
            if self._graphs:  # whose memory is free when what runs in it is over
                side.join(side.launch(lambda: None, []), [])
            self._graphs, self._known = [], now

    def _warn_of_fallback(self, target: Target) -> None:
        if not any(hasattr(each, "grad_sample") for each in target.networks[1].parameters()):  # Opacus' batches vary
            warnings.warn(
                f"MESA's average runs without a CUDA graph, which takes longer: {self._why}; capture=False does the "
                "same without this warning",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )

    def _warn_of_preparation(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the pass that mesa.prepare(...) started was not used, and is made again: give it what mesa(logits, "
                "...) is given after the logits, unchanged, and call both under the same torch.autocast",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )


def _versions(leaves: list[Any]) -> list[int]:
    try:
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
    except RuntimeError:  # of inference mode, which have none, and are not written to outside of it
        return []
