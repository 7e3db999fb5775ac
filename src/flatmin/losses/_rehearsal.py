"""Records a network's pass as a graph, after a pass that shows whether the graph would repeat it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from .._rng import CPU, set_torch_states, torch_states
from ..averages._copy import HOOKS, of_torch
from ..averages._layers import layers
from ._low import LowWeights
from ._side import Side
from ._target import Target

CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal}


class CannotRecordError(Exception):
    """Why the average is run as ever; completes a sentence."""


def described(leaf: Any) -> Any:
    """What of an input a graph depends on: a tensor's form, another's value.

    Raises:
        CannotRecordError: If nobody knows.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride() if leaf.layout == torch.strided else leaf.layout, leaf.dtype, leaf.device
    if not isinstance(leaf, CONSTANTS):
        raise CannotRecordError(f"its inputs hold a {type(leaf).__name__}")
    return type(leaf), leaf


def recorded(
    side: Side, target: Target, spec: Any, leaves: list[Any], used: list[Tensor]
) -> tuple[list[Any], list[Tensor], Callable[[], None], Any]:
    """Records a pass, after one that is watched.

    Args:
        side: Where it runs.
        target: The average, and how it is run.
        spec: How the inputs stand together.
        leaves: The inputs.
        used: The average's tensors.

    Returns:
        The graph's own inputs, all tensors that must live as long as it, what makes the pass again, and its outputs.

    Raises:
        CannotRecordError: If a graph would not repeat it.
    """
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(map(side.takes, used)):
        raise CannotRecordError("its weights are sharded, quantised or on several devices")
    if not all(map(side.takes, given)):
        raise CannotRecordError("its inputs are not plain tensors on its device")
    own = iter(kept := side.empty_like(given))
    inputs = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    dtype = target.precision()
    call: Callable[..., Any] = target.average if dtype is None else LowWeights(target.average, dtype, side)

    def run() -> Any:
        # What autocast has cast before is not in the graph, so it must not take that.
        lower = nullcontext() if dtype is None else torch.autocast(target.device.type, dtype, cache_enabled=False)
        args, kwargs = tree_unflatten(inputs, spec)
        with torch.no_grad(), lower:
            return target.inside(call, args, kwargs)

    outside = _Outside()

    def watched() -> Any:
        with outside:
            return run()

    def rehearsal() -> None:
        for ours, leaf in zip(kept, given, strict=True):
            ours.copy_(leaf)
        with _Rehearsal(side, target), side.refusing_waits():
            run()

    before = torch_states({CPU, target.device})
    try:
        side.join(side.launch(rehearsal, given), [])
        after = torch_states(device for device, _ in before)
        if not all(torch.equal(old, new) for (_, old), (_, new) in zip(before, after, strict=True)):
            raise CannotRecordError("it draws random numbers in evaluation mode")
        replay, outputs = side.record(watched)
    except CannotRecordError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise CannotRecordError(f"{type(error).__name__}: {said:.300}") from error
    finally:
        set_torch_states(before)
    return inputs, outside.tensors, replay, outputs


class _Outside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations inside use and do not make: a graph goes on to use its memory, whoever lets go of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, Tensor] = {}  # by where they are in memory
        self._made: set[int] = set()

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors."""
        return list(self._kept.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and (place := _place(each)) not in self._made:
                self._kept.setdefault(place, each)
        out = func(*args, **(kwargs or {}))
        places = (_place(each) for each in tree_leaves(out) if isinstance(each, Tensor))
        self._made.update(place for place in places if place not in self._kept)
        return out


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what a graph would not repeat raises."""

    def __init__(self, side: Side, target: Target) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._side = side
        self._layers = [target.average, *layers(target.networks[0])]
        self._looked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._looked:  # now, since hooks that the network has too are taken off in the pass
            self._looked = True
            hooks = (hook for layer in self._layers for name in HOOKS for hook in getattr(layer, name).values())
            if not all(map(of_torch, hooks)):
                raise CannotRecordError("it has forward hooks, which a graph would not run")
        if func.overloadpacket in READS and self._side.takes(args[0]):
            raise CannotRecordError("it reads values of its tensors, so that what it does depends on them")
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, out)):
            if isinstance(each, Tensor) and each.ndim and not self._side.takes(each):
                raise CannotRecordError("it uses tensors that are not on its device")
        return out
