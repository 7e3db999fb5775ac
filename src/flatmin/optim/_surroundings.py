"""What is around an optimizer's parameters: the network's buffers, and the gradients of other optimizers."""

import gc
import sys
import weakref
from collections.abc import Iterable
from itertools import compress
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .._walk import Walk
from ._foreach import put_back_
from ._others import OtherGradients, Others, own_parameters
from ._scale import has_unscaled, is_unstepped

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_WHOLE = (torch.jit.ScriptModule, fx.GraphModule)  # whose parts have lost their classes


_MOVING: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters without gradient that forward passes move


class Buffers:
    """The buffers of some modules as they are now, to be put back.

    Integers, and buffers that the modules replace by other tensors or shapes, are put back too. A buffer of a name that
    appears later stays. Parameters without gradient are put back where a forward pass was seen to move them, see
    `find_moving`; others are not copied.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._known: set[nn.Module] = set()
        self._frozen: list[tuple[Tensor, tuple[int, int]]] = []  # parameters without gradient, and their `_mark`
        self._rows: list[tuple[nn.Module, str, Tensor | None]] = []
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []  # buffers of one dtype and device, and copies
        self.add(modules)

    @torch.no_grad()
    def add(self, modules: Iterable[nn.Module]) -> None:
        """Copies those of further modules; of those that are known nothing."""
        alike: dict[object, list[Tensor]] = {}
        for module in modules:
            if module in self._known:
                continue
            self._known.add(module)
            frozen = [each for each in own_parameters(module) if not each.requires_grad and _can_be_changed(each)]
            self._frozen += [(parameter, _mark(parameter)) for parameter in frozen]
            found = [parameter for parameter in frozen if parameter in _MOVING]
            for name, buffer in module._buffers.items():
                self._rows.append((module, name, buffer))
                if buffer is not None and _can_be_changed(buffer):
                    found.append(buffer)
            for tensor in found:
                alike.setdefault((tensor.dtype, tensor.device, type(tensor)), []).append(tensor)
        for buffers in alike.values():
            copies = [torch.empty_like(buffer) for buffer in buffers]
            torch._foreach_copy_(copies, buffers)
            self._copies.append((buffers, copies))

    def find_moving(self) -> None:
        """Looks for parameters without gradient that were written since: they are as buffers from now on.

        Such as those of a key encoder that follows the query encoder in each forward pass.
        """
        _MOVING.update((parameter, None) for parameter, mark in self._frozen if _mark(parameter) != mark)

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Puts all back. It can be done more than once.

        Args:
            where: Only where this flag on the device is True; of buffers elsewhere, and of those that were replaced by
                others of another kind, nothing is put back then.
        """
        if where is not None:
            self._restore_where(where)
            return
        for buffers, copies in self._copies:
            if any(buffer.shape != copy.shape for buffer, copy in zip(buffers, copies, strict=True)):
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.resize_(copy.shape)
            torch._foreach_copy_(buffers, copies)
        for module, name, old in self._rows:
            if module._buffers[name] is not old:
                setattr(module, name, old)  # not in _buffers, which a scripted module has not

    def _restore_where(self, flag: Tensor) -> None:
        now: dict[Tensor, Tensor] = {}
        for module, name, old in self._rows:
            new = module._buffers[name]
            if old is not None and new is not None:
                now[old] = new
        tensors, before = [], []
        for buffers, copies in self._copies:
            for buffer, copy in zip(buffers, copies, strict=True):
                new = now.get(buffer, buffer)
                if new.device == flag.device and (new.shape, new.dtype) == (copy.shape, copy.dtype):
                    tensors.append(new)
                    before.append(copy)
        put_back_(tensors, before, flag)


class Surroundings:
    """Finds the modules that hold an optimizer's parameters, other optimizers, and scalers.

    They are looked for once, among all objects of the process: an optimizer is told of none, and torch's hooks on
    all modules make a compiled network compile anew in each step. Nothing is kept alive.

    Args:
        model: The network, if it is given. None: its normalisation layers are looked for.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self._thread = get_ident()
        self._walk: Walk | None = None
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._others: Others | None = None  # None: not looked for yet
        self._scalers: list[weakref.ref[GradScaler]] = []

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.model,)  # a copy looks for itself

    def modules(self, parameters: list[Tensor]) -> list[nn.Module]:
        """Those whose buffers stand still in the second pass, and in a step that is dropped.

        With a model all of its modules; without it, the layers in training mode that `statistics_of` finds around
        ``parameters``, and those that were `seen`.
        """
        if self.model is not None:
            if self._walk is None or self._walk.network is not self.model:
                self._walk = Walk(self.model, nn.Module.modules)
            return self._walk.modules()
        self._look(parameters)
        return [layer for layer in self._layers if layer.training]

    def seen(self, module: nn.Module) -> list[nn.Module]:
        """Notes the layers of a module that has been called, and returns those in training mode."""
        layers = [layer for layer in statistics_of(module) if layer.training]
        self._layers.update(layers)
        return layers

    def other_gradients(self, parameters: list[Tensor]) -> OtherGradients:
        """The gradients of what other optimizers train, set aside."""
        self._look(parameters)
        assert self._others is not None
        return OtherGradients(self._others.parameters(set(parameters)))

    def rest(self, parameters: list[Tensor], *, look: bool) -> list[tuple[Optimizer, list[Tensor]]]:
        """Other optimizers with what they train of the network of ``parameters``, and nobody perturbs.

        Args:
            parameters: The optimizer's.
            look: Whether to look for them, if that was not done; or nothing is known.
        """
        if look:
            self._look(parameters)
        return [] if self._others is None else self._others.rest()

    def scaler_of(self, optimizer: Optimizer) -> GradScaler | None:
        """The scaler by which a loop has just unscaled the optimizer's gradients, if there is one."""
        self._look([parameter for group in optimizer.param_groups for parameter in group["params"]])
        for scaler in (reference() for reference in self._scalers):
            if scaler is not None and scaler.is_enabled() and has_unscaled(scaler, optimizer):
                return scaler
        return None

    def scalers(self, parameters: list[Tensor]) -> list[GradScaler]:
        """The scalers that there are."""
        self._look(parameters)
        found = (reference() for reference in self._scalers)
        return [each for each in found if each is not None and each.is_enabled()]

    def is_scaled_still(self, parameters: list[Tensor]) -> bool:
        """Whether a scaler has scaled a loss and has never unscaled a gradient, of any optimizer."""
        return any(map(is_unstepped, self.scalers(parameters)))

    def _look(self, parameters: list[Tensor]) -> None:
        if self._others is not None:
            return
        alive = _alive((nn.Module, Optimizer, GradScaler))
        self._scalers = [weakref.ref(found) for found in alive if issubclass(type(found), GradScaler)]
        modules = [found for found in alive if issubclass(type(found), nn.Module)]
        optimizers = [found for found in alive if issubclass(type(found), Optimizer)]
        own = set(parameters)
        around = _around(own, modules) if self.model is None else set(self.model.modules())
        self._others = Others(around, own, optimizers, self._thread)
        if self.model is None:
            for module in around:
                self._layers.update(statistics_of(module))


def step_sizes_among(parameters: list[Tensor]) -> bool:
    """Whether fake quantisers of torchao's learn one of ``parameters``; they are looked for among all objects."""
    kind = getattr(sys.modules.get("torchao.quantization.qat.fake_quantizer"), "FakeQuantizerBase", None)
    if kind is None:
        return False
    own = set(parameters)
    return any(parameter in own for found in _alive((kind,)) for parameter in own_parameters(found))


def statistics_of(module: nn.Module) -> list[nn.Module]:
    """The module if it is a normalisation layer of torch, or derived from one; all of a scripted or exported one."""
    if isinstance(module, _WHOLE):
        return list(module.modules())
    return [module] if isinstance(module, NORMS) and module._buffers else []


def _around(parameters: set[Tensor], modules: list[nn.Module]) -> set[nn.Module]:
    """Of ``modules`` those that hold one of ``parameters``, those that hold such a module, and all inside them."""
    parents: dict[nn.Module, list[nn.Module]] = {}
    for module in modules:
        for child in _children(module):
            parents.setdefault(child, []).append(module)
    found: set[nn.Module] = set()
    due = [module for module in modules if any(parameter in parameters for parameter in own_parameters(module))]
    while due:
        module = due.pop()
        if module not in found:
            found.add(module)
            due += parents.get(module, [])
    return {inner for module in found for inner in module.modules()}


def _children(module: nn.Module) -> list[nn.Module]:
    # a module whose constructor has failed, or has not run, has no such attribute
    return [child for child in getattr(module, "_modules", {}).values() if child is not None]


def _alive(kinds: tuple[type, ...]) -> list[Any]:
    """All objects of some classes and their subclasses; by their type, since some pretend to be of another class."""
    objects = gc.get_objects()
    types = list(map(type, objects))
    wanted = {found for found in set(types) if issubclass(found, kinds)}
    return list(compress(objects, map(wanted.__contains__, types)))


def _mark(parameter: Tensor) -> tuple[int, int]:
    """What is another one after a parameter was written in place, or given other ``.data``."""
    return parameter._version, parameter.data_ptr() if type(parameter) in (Tensor, nn.Parameter) else 0


def _can_be_changed(buffer: Tensor) -> bool:
    """Whether torch would write to it in place: not where elements share memory, or that inference mode made."""
    if buffer.is_inference() or buffer.layout != torch.strided or nn.parameter.is_lazy(buffer):
        return False
    if buffer.is_contiguous():
        return True
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
