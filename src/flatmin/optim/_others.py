"""Other optimizers, and what they train beside the optimizer whose step is made."""

import functools
import weakref
from collections.abc import Iterable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class OtherGradients:
    """Keeps the first pass from leaving a gradient in what other optimizers train: it is that of the second alone.

    Their gradients are set aside during the first pass, and not copied.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._aside = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, gradient in self._aside:
            if gradient is not None:
                parameter.grad = None

    def keep(self) -> None:
        """As if nothing had been set aside: the gradients of the first pass are added to those."""
        with torch.no_grad():
            for parameter, gradient in self._aside:
                if gradient is not None:
                    if parameter.grad is not None:
                        gradient += parameter.grad
                    parameter.grad = gradient
        self._aside.clear()

    def drop(self) -> None:
        """Forgets the gradients of the first pass, and puts back those that were set aside."""
        for parameter, gradient in self._aside:
            parameter.grad = gradient
        self._aside.clear()

    # Where the first pass was over before, its gradients are among those set aside. Inside, the second pass is made.

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for parameter, gradient in self._aside:
            if kind is not None or parameter.grad is None:  # that the second pass has not reached
                parameter.grad = gradient
        self._aside.clear()


class Others:
    """Knows other optimizers, and what they train beside an optimizer: the rest of its network, and elsewhere.

    An optimizer that is made later is noticed when it steps. All of the network is known before, whoever trains it; of
    parameters elsewhere, such as a loss's own, those that some optimizer had. What is trained in another thread belongs
    to another training, and is left alone. Nothing is kept alive.

    Args:
        network: The modules around the optimizer's parameters.
        own: These parameters.
        optimizers: All that there are, the optimizer among them.
        thread: In which the optimizer was made.
    """

    def __init__(
        self, network: Iterable[nn.Module], own: set[Tensor], optimizers: list[Optimizer], thread: int
    ) -> None:
        self._thread = thread
        self._last: int | None = None  # in which the optimizer's last step was: a training may go on in another one
        left = dict.fromkeys(each for module in network for each in own_parameters(module) if each not in own)
        self._network = list(map(weakref.ref, left))  # the rest of it, but for what optimizers of flatmin's perturb
        self._left = [*self._network]  # and what is trained elsewhere
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._rest: list[tuple[weakref.ref[Optimizer], list[weakref.ref[Tensor]]]] = []
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        for optimizer in sorted(optimizers, key=lambda each: _base(each) is None):
            if any(each not in own for each in _parameters(optimizer)):
                self._add(optimizer)
        self._known.update(optimizers)
        global _kept
        _kept = [*map(weakref.ref, _alive(_kept)), weakref.ref(self)]
        _watch_all()

    def notice(self, optimizer: Optimizer) -> None:
        """Called before each step of any optimizer."""
        if optimizer not in self._known:
            self._add(optimizer)

    def parameters(self, own: set[Tensor]) -> list[Tensor]:
        """All that may be trained beside ``own``."""
        found = dict.fromkeys(each for each in _alive(self._left) if each.requires_grad)
        others = _alive(self._optimizers)
        for optimizer in others:  # they may have been given more
            found.update(dict.fromkeys(_parameters(optimizer)))
        left_alone = own.union(*(_parameters(each) for each in others if self._is_elsewhere(each)))
        self._last = get_ident()
        return [each for each in found if each not in left_alone]

    def rest(self) -> list[tuple[Optimizer, list[Tensor]]]:
        """Optimizers with what they train of the network, and nobody perturbs."""
        found = ((owner(), trained) for owner, trained in self._rest)
        return [(owner, _alive(trained)) for owner, trained in found if owner is not None]

    def _is_elsewhere(self, other: Optimizer) -> bool:
        """Whether another optimizer is stepped in another thread, or before its first step was made in another one."""
        if other in _stepped:
            return _stepped[other] not in (get_ident(), self._last)
        return _made.get(other, self._thread) != self._thread

    def _add(self, optimizer: Optimizer) -> None:
        trained, base = dict.fromkeys(_parameters(optimizer)), _base(optimizer)
        self._known.update((optimizer,) if base is None else (optimizer, base))
        self._optimizers = [*map(weakref.ref, _alive(self._optimizers)), weakref.ref(optimizer)]
        self._left = list(map(weakref.ref, dict.fromkeys([*_alive(self._left), *trained])))
        left = dict.fromkeys(_alive(self._network))
        if base is not None:
            self._network = [weakref.ref(each) for each in left if each not in trained]
            return
        self._rest = [pair for pair in self._rest if pair[0]() is not None]
        if theirs := [weakref.ref(each) for each in trained if each in left]:
            self._rest.append((weakref.ref(optimizer), theirs))


_made: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()  # threads; of those that are wrapped
_stepped: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()
_kept: list[weakref.ref[Others]] = []  # a list is replaced and never changed, since other threads go over it


@functools.cache
def _watch_all() -> None:
    """Has every optimizer noticed as it steps, from now on: to take the hook away again could disturb a step."""

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            _stepped[optimizer] = get_ident()
            for others in _alive(_kept):
                others.notice(optimizer)

    register_optimizer_step_pre_hook(before_step)


def note_thread(*optimizers: Optimizer) -> None:
    """Notes in which thread optimizers were made, and from now on in which each is stepped."""
    _watch_all()
    for optimizer in optimizers:
        _made[optimizer] = get_ident()


def own_parameters(module: nn.Module) -> list[Tensor]:
    """Those of a module itself; a module whose constructor has failed, or has not run, has no such attribute."""
    return [parameter for parameter in getattr(module, "_parameters", {}).values() if parameter is not None]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", []) for parameter in group["params"]]


def _base(optimizer: Optimizer) -> Optimizer | None:
    """What one of flatmin's optimizers is around."""
    base = vars(optimizer).get("base_optimizer")
    return base if isinstance(base, Optimizer) else None


def _alive(references: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [each for reference in references if (each := reference()) is not None]
