"""What is attached to an optimizer: told of its steps, saved in its ``state_dict`` and loaded with it.

The state stands in the optimizer's state dict under `KEY`, beside ``"state"`` and ``"param_groups"``: whoever saves the
optimizer saves it. Nothing here is collective, since a trainer may save on one rank alone.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from ._checks import check_mapping, shown, trains
from ._warn import depth_in_package
from .errors import FlatminWarning, InvalidArgumentError

KEY = "flatmin.attached"
# Where trainers' wrappers, on which torch's hooks do not work, keep the optimizer; by package.
HOLDERS = {
    "accelerate": "optimizer",
    "lightning": "optimizer",
    "lightning_fabric": "optimizer",
    "opacus": "original_optimizer",
    "pytorch_lightning": "optimizer",
}

_thread = threading.local()


class Attachment:
    """That a module is attached to an optimizer.

    A copy of the module is attached to the copy of the optimizer if both are copied in one call of ``copy.deepcopy``,
    the optimizer first. Otherwise the copy is `lost`.

    Attributes:
        lost: Whether it belongs to a copy that is attached to no optimizer.
        updating: Whether it calls ``after_step`` now.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        after_step: Callable[[Any], None] | None,
        save: Callable[[Any], dict[str, Any]],
    ) -> None:
        self.lost = self.updating = False
        self._made = (ref(module), ref(optimizer), after_step, save)  # weak: the optimizer's hooks keep the module
        self._carrier = _carrier_of(optimizer)
        self._carrier.entries.append((module, save))
        self._hook = None
        if after_step is not None:

            def after(stepped: Optimizer, *_: Any) -> None:
                if not getattr(stepped, "_dropped", False):  # by one of flatmin's
                    self.updating = True
                    try:
                        after_step(module)
                    finally:
                        self.updating = False

            self._hook = optimizer.register_step_post_hook(after)

    def remove(self) -> None:
        """Detaches."""
        if self.lost:
            return
        module = self._made[0]()
        if self._hook is not None:
            self._hook.remove()
        self._carrier.entries = [entry for entry in self._carrier.entries if entry[0] is not module]
        if module is not None:
            vars(module)["_attachments"] = [each for each in _attachments(module) if each is not self]

    def connects(self, optimizer: Optimizer) -> bool:
        """Whether it is to ``optimizer``, or to the one that it wraps or that wraps it."""
        return not self.lost and self._carrier is CARRIERS.get(_innermost(optimizer))

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        if self.lost:
            return _lost()
        module, optimizer = (memo.get(id(end())) for end in self._made[:2])
        return _lost() if optimizer is None or module is None else Attachment(module, optimizer, *self._made[2:])

    def __reduce__(self) -> Any:
        return _lost, ()  # torch's optimizers lose their hooks when they are pickled


def attach(
    module: nn.Module,
    optimizer: Optimizer,
    *,
    network: nn.Module | None = None,
    after_step: Callable[[Any], None] | None = None,
    save: Callable[[Any], dict[str, Any]] = nn.Module.state_dict,
) -> Attachment:
    """Attaches a module to an optimizer; once, however often it is called.

    Args:
        module: What is saved and loaded with the optimizer. Those of one class are told apart by their order.
        optimizer: A plain one or flatmin's, also as a trainer has wrapped it.
        network: The network that the optimizer must train, or a part of it. None: any.
        after_step: Called with the module after each step; not after one that flatmin's has dropped.
        save: Returns the module's state, without talking to other ranks.

    Raises:
        InvalidArgumentError: If ``optimizer`` is none, one on which torch's hooks do not work, or another network's.
    """
    optimizer = _inside(optimizer)
    if network is not None:
        _check_trains(optimizer, network, type(module).__name__)
    known = [each for each in _attachments(module) if not each.lost]
    for each in known:
        if each.connects(optimizer):
            return each
    made = Attachment(module, optimizer, after_step, save)
    vars(module)["_attachments"] = [*known, made]
    return made


def is_lost_copy(module: nn.Module) -> bool:
    """Whether a module is a copy of an attached one, and is attached to no optimizer."""
    return any(each.lost for each in _attachments(module))


def is_updated_twice(module: nn.Module) -> bool:
    """Whether a module that an optimizer updates is being updated by somebody else."""
    hooked = [each for each in _attachments(module) if not each.lost and each._hook is not None]
    return bool(hooked) and not any(each.updating for each in hooked)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, optimizers' state dicts neither hold nor expect what is attached: it is saved in another place."""
    before = getattr(_thread, "apart", False)
    _thread.apart = True
    try:
        yield
    finally:
        _thread.apart = before


def warn_of_unattached(state_dict: dict[str, Any], optimizer: Optimizer) -> None:
    """Warns of what was attached when a state was saved, where nothing is attached to ``optimizer``."""
    if state_dict.get(KEY) and _innermost(optimizer) not in CARRIERS:
        _warn_of_rest(list(state_dict[KEY]))


class _Carrier:
    """Saves and loads what is attached to one optimizer, which keeps it by its hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.entries: list[tuple[nn.Module, Callable[[Any], dict[str, Any]]]] = []
        self._warned = False
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        if getattr(_thread, "apart", False) or not self.entries:
            return None
        return {**state_dict, KEY: {name: save(module) for name, (module, save) in self._named().items()}}

    def _load(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        if getattr(_thread, "apart", False):
            return None
        check_mapping("state_dict", state_dict)
        found = dict(check_mapping(f"state_dict[{KEY!r}]", state_dict.get(KEY, {})))
        missing = []
        for name, (module, _save) in self._named().items():
            if name in found:
                module.load_state_dict(found.pop(name))
            else:
                missing.append(name)
                for inner in module.modules():
                    getattr(inner, "_settle_loads", int)()  # of averages, which would say the same
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"the optimizer's state has nothing of {', '.join(missing)}, attached to it now: what there is was "
                "kept; load its own state_dict, if it was saved elsewhere, or it begins anew",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
        if found:
            _warn_of_rest(list(found))
        return {key: value for key, value in state_dict.items() if key != KEY}

    def _named(self) -> dict[str, tuple[nn.Module, Callable[[Any], dict[str, Any]]]]:
        """Entries by class, and by their order among those of a class: MESA, MESA.1."""
        named: dict[str, tuple[nn.Module, Callable[[Any], dict[str, Any]]]] = {}
        for entry in self.entries:
            kind = type(entry[0]).__name__
            number = sum(type(module).__name__ == kind for module, _ in named.values())
            named[f"{kind}.{number}" if number else kind] = entry
        return named


CARRIERS: "WeakKeyDictionary[Optimizer, _Carrier]" = WeakKeyDictionary()


def _carrier_of(optimizer: Optimizer) -> _Carrier:
    innermost = _innermost(optimizer)
    if innermost not in CARRIERS:
        CARRIERS[innermost] = _Carrier(innermost)
    return CARRIERS[innermost]


def _inside(optimizer: Any) -> Optimizer:
    """The optimizer that a trainer has wrapped; one that is not wrapped as it is."""
    given = optimizer
    while name := next((HOLDERS[each] for each in _packages(optimizer) if each in HOLDERS), None):
        optimizer = getattr(optimizer, name, None)
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        raise InvalidArgumentError(
            f"optimizer must be a torch.optim.Optimizer on which torch's hooks work, got {shown(given)}; if it "
            "wraps another, attach to that one"
        ) from None
    return optimizer  # type: ignore[no-any-return]


def _check_trains(optimizer: Optimizer, network: nn.Module, name: str) -> None:
    """Raises `InvalidArgumentError` if ``optimizer`` has no parameter of ``network``, so that their steps differ."""
    if not trains(optimizer, network):
        raise InvalidArgumentError(
            f"optimizer, a {type(optimizer).__name__}, trains no parameter of the network that this {name} was made "
            "of: attach it to the optimizer of that network, or if this one trains copies of them, call update() "
            "after each step yourself"
        )


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of flatmin's, whose state dict theirs has in it."""
    base = getattr(optimizer, "base_optimizer", None) if "flatmin" in _packages(optimizer) else None
    return _innermost(base) if isinstance(base, Optimizer) else optimizer


def _packages(value: object) -> set[str]:
    """The packages that its class, and those it is made of, come from."""
    return {kind.__module__.partition(".")[0] for kind in type(value).__mro__}


def _attachments(module: nn.Module) -> list[Attachment]:
    known: list[Attachment] = vars(module).get("_attachments", [])
    return known


def _lost() -> Attachment:
    attachment = Attachment.__new__(Attachment)
    attachment.lost, attachment.updating = True, False
    return attachment


def _warn_of_rest(names: list[str]) -> None:
    warnings.warn(
        f"the optimizer's state has that of {', '.join(names)}, which is not attached to it now, and was left out: "
        "attach it before the state is loaded",
        FlatminWarning,
        stacklevel=depth_in_package(),
    )
