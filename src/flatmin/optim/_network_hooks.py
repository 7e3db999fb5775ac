"""Weights that are moved in the passes of a loop that knows nothing of it: hooks on a network say when.

They are moved before a training forward (in training mode, with gradients enabled), and put back when the backward
passes through all that training forwards have returned are over. A forward without gradients in between is made at the
clean weights, and a state dict has them, whoever saves. Within the passes that an optimizer of flatmin makes itself, by
a closure or a loop over its passes, nothing is done.
"""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DataParallel

from .._distributed import wrappers_and_network
from .._passes import current_pass
from ..errors import InvalidArgumentError
from ._displaced import Displaced


class Owner(Protocol):
    """Who moves weights."""

    displaced: Displaced

    def move(self) -> None:
        """Moves the weights for a training forward; called before each, so that it does nothing while they are."""

    def owned(self) -> set[Tensor]:
        """The parameters that are its own."""


class Attached:
    """Says an owner when the passes through a network begin and end. Does not keep it alive.

    Args:
        model: The network, in its wrappers or not. Of a container that is not called, such as ``nn.ModuleList``, the
            modules in it count. An owner of the same parameters that was attached before is detached.
        owner: The owner.
        evaluated: Called with the module before a forward pass that is none of training; does not refer to the owner.

    Attributes:
        held: Whether the weights stay moved until `end`, whatever passes are over.
    """

    def __init__(
        self, model: nn.Module, owner: Owner, evaluated: Callable[[nn.Module], None] = lambda module: None
    ) -> None:
        self.held = False
        self._evaluated = evaluated
        self._displaced = displaced = owner.displaced
        self._owner = weakref.ref(owner, lambda _: displaced.restore())
        self._calls: list[object] = []  # of forwards that run now
        self._open: set[weakref.ref[_Pending]] = set()  # outputs whose backward pass may come
        self._task, self._gone = -1, list[weakref.ref[_Pending]]()  # of the backward pass that runs
        for root in _called(model):
            for other in _attached_to(root):
                if (theirs := other._owner()) is not None and theirs.owned() & owner.owned():
                    other.end()
                    _registry[root].discard(other)
            _hook(root)
            _registry[root].add(self)

    @property
    def clean(self) -> dict[Tensor, Tensor]:
        """The moved parameters, with their clean weights."""
        return self._displaced.clean

    def end(self, because: str = "") -> None:
        """Puts the weights back and forgets all passes. A backward pass that comes yet is refused if there is a reason.

        Forwards that were interrupted, of which nothing else is heard, are forgotten too.
        """
        for reference in self._open:
            if self.clean and (pending := reference()) is not None:
                pending.refused = because
        self._calls.clear()
        self._open.clear()
        self.held = False
        self._displaced.restore()

    def before(self, module: nn.Module) -> None:
        """Before a forward."""
        owner = self._owner()
        if owner is None:
            return
        training, gradients = module.training, torch.is_grad_enabled()
        if _in_backward():  # what gradient checkpointing computes again
            if training and gradients and not self._open:
                raise InvalidArgumentError(
                    "the whole network runs in checkpoint(..., use_reentrant=True), whose first forward pass has no "
                    "gradients, so that the weights were clean: use use_reentrant=False, or checkpoint parts of it"
                )
            return
        if training and gradients:
            self._displaced.resume()  # if a forward without gradients was interrupted
            self._calls.append(_TRAINING)
            owner.move()
            return
        self._evaluated(module)
        if gradients:  # its backward pass will need the clean weights
            if self.clean:
                self.end("a forward pass in evaluation mode came before it")
            self._calls.append(None)
        else:
            self._calls.append(_CLEAN if self._displaced.suspend() else None)

    def after(self, output: Any) -> None:
        """After a forward; without an output if it has failed."""
        if _in_backward() or not self._calls:
            return
        call = self._calls.pop()
        if call is _CLEAN:
            self._displaced.resume()
        elif call is _TRAINING:
            self._watch(output)
        self._settle()

    def _settle(self) -> None:
        """Puts the weights back if no training forward runs and no backward pass can come."""
        if not (self.held or self._open or _TRAINING in self._calls):
            self._displaced.restore()

    def _watch(self, output: Any) -> None:
        """Waits for the backward passes through what a training forward has returned."""
        leaves = list(_leaves(output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if tensor.grad_fn is not None:
                pending = _Pending()
                pending.reference = weakref.ref(pending, self._died)
                self._open.add(pending.reference)
                tensor.register_hook(functools.partial(self._backward, pending))  # type: ignore[no-untyped-call]
        if not self._open and any(not isinstance(leaf, Tensor) or leaf.requires_grad for leaf in leaves):
            self.held = True  # a graph that cannot be watched

    def _backward(self, pending: "_Pending", _: Tensor) -> None:
        """Before a backward pass goes through an output."""
        if pending.refused:
            raise InvalidArgumentError(
                f"this backward pass needs the perturbed weights, which were put back: {pending.refused}; do that "
                "before the forward pass or after backward()"
            )
        if pending.reference not in self._open or _keeps_graph():  # of an earlier step, or another pass may come
            return
        if self._task != (number := torch._C._current_graph_task_id()):
            self._task, self._gone = number, []
            torch.autograd.Variable._execution_engine.queue_callback(_Over(self, self._gone))
        self._gone.append(pending.reference)

    def over(self, gone: "list[weakref.ref[_Pending]]") -> None:
        """After a backward pass, or where it has failed."""
        self._open.difference_update(gone)
        self._settle()

    def _died(self, reference: "weakref.ref[_Pending]") -> None:
        """When a graph is freed: no backward pass can go through it."""
        if reference in self._open:
            self._open.discard(reference)
            if not torch._C._len_torch_dispatch_stack() and not torch._C._are_functorch_transforms_active():
                self._settle()  # nothing is written within a mode of somebody else's


class _Pending:
    """An output whose backward pass may come; lives as long as its graph."""

    reference: "weakref.ref[_Pending]"
    refused = ""


class _Over:
    """Is called at the end of a backward pass, and deleted without a call where that fails."""

    def __init__(self, attached: Attached, gone: "list[weakref.ref[_Pending]]") -> None:
        self._attached: Attached | None = attached
        self._gone = gone

    def __call__(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.over(self._gone)

    __del__ = __call__


_TRAINING, _CLEAN = object(), object()  # a forward that runs: at the moved weights, at the clean ones for a moment


def _called(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose call is a forward pass, and that take hooks."""
    layers = wrappers_and_network(model)
    parallel = [layer for layer in layers if isinstance(layer, DataParallel)]  # copies the weights before what is in it
    hooked = [layer for layer in reversed(layers) if not isinstance(layer, torch.jit.ScriptModule)]
    for network in (parallel or hooked)[:1]:
        if getattr(network.forward, "__func__", None) is nn.Module.forward:  # a container's
            for child in network.children():
                yield from _called(child)
        else:
            yield network


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _keeps_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors in an output, and objects of which nobody knows whether they hold some."""
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, (str, bytes, int, float, complex)):
        yield value


# The hooks look up what is attached to a module: in a copy of it they do nothing.

_registry: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Attached]]" = weakref.WeakKeyDictionary()
_thread = threading.local()


@contextmanager
def unattended() -> Iterator[None]:
    """Inside, in this thread, nothing attached does anything: an optimizer makes its passes itself."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def _attached_to(module: nn.Module) -> list[Attached]:
    return list(_registry.get(module, ()))


def _attended() -> bool:
    """Not where an optimizer makes its passes itself, and not within torch.func, which has weights of its own."""
    unasked = current_pass() is not None or getattr(_thread, "depth", 0) > 0
    return not unasked and not torch._C._are_functorch_transforms_active()


@_disable_dynamo
def _before(module: nn.Module, _: Any) -> None:
    if _attended():
        for attached in _attached_to(module):
            attached.before(module)


@_disable_dynamo
def _after(module: nn.Module, _: Any, output: Any) -> None:
    if _attended():
        for attached in _attached_to(module):
            attached.after(output)


def _saved(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts the clean weights into a state dict that is made while they are moved."""
    for attached in _attached_to(module):
        clean = attached.clean
        named = list(module.named_parameters(remove_duplicate=False)) if clean else []
        if any(state.get(prefix + name) is parameter for name, parameter in named):  # keep_vars=True
            attached.end("a state dict with keep_vars was made")
            continue
        state.update({prefix + name: clean[p] for name, p in named if p in clean and prefix + name in state})


def _loaded(module: nn.Module, *_: Any) -> None:
    for attached in _attached_to(module):
        attached.end("a state dict was loaded")


def _copied(reference: "weakref.ref[nn.Module]") -> Any:
    """What a copy or a pickle of a network is made of: the clean weights, and nothing that is attached."""
    module = reference()
    assert module is not None
    for attached in _attached_to(module):
        attached.end("the network was copied")
    own = getattr(type(module), "__getstate__", None)
    state = vars(module) if own in (None, getattr(object, "__getstate__", None)) else own(module)
    if not isinstance(state, dict):
        return state
    ours = {
        key
        for name in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
        for key, hook in vars(module)[name].items()
        if getattr(hook, "hook", hook) in _HOOKS
    }
    kept = {name: value for name, value in state.items() if name != "__getstate__"}
    for name, value in kept.items():
        if name.endswith(("_hooks", "_called")) and isinstance(value, dict) and ours & value.keys():
            kept[name] = type(value)((key, hook) for key, hook in value.items() if key not in ours)
    return kept


_HOOKS = (_before, _after, _saved, _loaded)


def _hook(root: nn.Module) -> None:
    """Registers the hooks, once."""
    if root in _registry:
        return
    _registry[root] = weakref.WeakSet()
    root.register_forward_pre_hook(_before, prepend=True)
    root.register_forward_hook(_after, always_call=True)
    root.register_state_dict_post_hook(_saved)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(_loaded)  # type: ignore[no-untyped-call]
    if not hasattr(type(root), "__deepcopy__"):  # of scripted and traced ones
        root.__dict__["__getstate__"] = functools.partial(_copied, weakref.ref(root))
