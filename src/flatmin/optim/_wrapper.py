"""A torch optimizer around another one, and what it remembers of each parameter beside the other's state."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._attached import warn_of_unattached
from ..errors import InvalidArgumentError

OWN = "flatmin"  # the key of what is not the base optimizer's in a state dict


class Wrapper(Optimizer, ABC):
    """An optimizer whose ``param_groups``, ``state`` and ``defaults`` are those of the one that it wraps.

    They are read from it, and set in it, whenever they are used; so whatever is done to either is done to both.

    Args:
        base_optimizer: The optimizer, an instance.

    Raises:
        InvalidArgumentError: (a ValueError) if it cannot be wrapped.
    """

    base_optimizer: Optimizer

    def __init__(self, base_optimizer: Optimizer) -> None:
        check_base(base_optimizer)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)  # makes the hooks; sets nothing below
        self.base_optimizer = base_optimizer

    # torch's constructor sets these three, and adds the groups, before there is a base: nothing to do then.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._has_base():
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state of each parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._has_base():
            self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._has_base():
            self.base_optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the base optimizer, and so to this one."""
        if self._has_base():
            self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base optimizer's state, and under ``"flatmin"`` what there is beside it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state: dict[str, Any] = {**self.base_optimizer.state_dict(), OWN: self._own_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a plain optimizer's state fits too, and begins at step 0."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        warn_of_unattached(state_dict, self.base_optimizer)
        self._load(
            {name: part for name, part in state_dict.items() if name != OWN},
            state_dict.get(OWN, {}),
        )
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What there is beside the base optimizer's state."""

    @abstractmethod
    def _load(self, base: dict[str, Any], own: dict[str, Any]) -> None:
        """Loads the base optimizer's state, and what `_own_state` returned or nothing."""

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds; hooks and the step a scheduler has patched belong to this object.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def _has_base(self) -> bool:
        return "base_optimizer" in self.__dict__


class Memory:
    """Tensors by name and parameter. None is ever changed in place, so that states can share them.

    Apart from the base optimizer's state: torch's optimizers set up theirs only where there is none yet.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[Tensor, Tensor]] = {}
        self._staged: list[tuple[str, bool, dict[Tensor, Tensor]]] = []

    def get(self, name: str, parameters: list[Tensor]) -> list[Tensor | None]:
        """What is remembered of each under ``name``; None where there is nothing."""
        known = self._tensors.get(name, {})
        return [known.get(parameter) for parameter in parameters]

    def known(self, name: str, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those of ``parameters`` of which something is remembered under ``name``, and that."""
        known = self._tensors.get(name, {})
        some = [parameter for parameter in parameters if parameter in known]
        return some, [known[parameter] for parameter in some]

    def put(self, name: str, parameters: list[Tensor], tensors: list[Tensor]) -> None:
        """Remembers ``tensors`` themselves, not copies, beside those of other parameters, once the step is made."""
        self._staged.append((name, False, dict(zip(parameters, tensors, strict=True))))

    def replace(self, name: str, parameters: list[Tensor], tensors: list[Tensor]) -> None:
        """Remembers ``tensors`` in place of all that there was under ``name``, once the step is made."""
        self._staged.append((name, True, dict(zip(parameters, tensors, strict=True))))

    def commit(self) -> None:
        """The step is made."""
        for name, alone, tensors in self._staged:
            self._tensors[name] = tensors if alone else {**self._tensors.get(name, {}), **tensors}
        self._staged.clear()

    def forget(self) -> None:
        """The step is not made."""
        self._staged.clear()

    def state_dict(self, groups: list[dict[str, Any]]) -> dict[int, dict[str, Tensor]]:
        """Returns it by the index of the parameter in ``groups``, as torch's optimizers do."""
        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(_parameters(groups)):
            entries = {name: known[parameter] for name, known in self._tensors.items() if parameter in known}
            if entries:
                state[index] = entries
        return state

    @classmethod
    def from_state(cls, state: Mapping[int, Mapping[str, Tensor]], groups: list[dict[str, Any]]) -> "Memory":
        """Makes one of what `state_dict` returned, on the device and with the dtype of each parameter.

        Raises:
            InvalidArgumentError: If it belongs to other parameters.
        """
        parameters, memory = _parameters(groups), cls()
        for index, entries in state.items():
            if not 0 <= index < len(parameters):
                raise InvalidArgumentError(
                    f"state_dict['flatmin'] has a parameter {index}, and there are {len(parameters)}; "
                    "load it into an optimizer of the same parameters"
                )
            parameter = parameters[index]
            for name, tensor in entries.items():
                if tensor.shape != parameter.shape:
                    raise InvalidArgumentError(
                        f"state_dict['flatmin'] has {name} of shape {tuple(tensor.shape)} for parameter {index} of "
                        f"shape {tuple(parameter.shape)}; load it into an optimizer of the same parameters"
                    )
                own = tensor.detach().to(device=parameter.device, dtype=parameter.dtype)
                memory.put(name, [parameter], [own])
        memory.commit()
        return memory


def check_base(base: object) -> None:
    """Checks that ``base`` is a torch optimizer that can be wrapped, and can step without a closure."""
    if isinstance(base, type):
        raise InvalidArgumentError(
            f"base_optimizer must be an instance, got the class {base.__name__}; "
            f"write {base.__name__}(model.parameters(), lr=...)"
        )
    kind = type(base).__name__
    if not isinstance(base, Optimizer):
        raise InvalidArgumentError(f"base_optimizer must be a torch.optim.Optimizer, got {kind}")
    if isinstance(base, Wrapper):
        raise InvalidArgumentError(f"base_optimizer is a {kind} already; wrap the plain optimizer once")
    try:
        base.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        raise InvalidArgumentError(
            f"base_optimizer {kind} leaves out torch.optim.Optimizer.__init__, so that torch's hooks do not work on "
            f"it; if it wraps another, wrap that one, and {kind} around it"
        ) from None
    try:
        signature(type(base).step).bind(base)
    except TypeError:
        raise InvalidArgumentError(
            f"base_optimizer must step without a closure of its own, which {kind} cannot"
        ) from None
    if any(group.get("maximize") for group in base.param_groups):
        raise InvalidArgumentError(
            "base_optimizer has maximize=True, and the weights would be moved to where that is easiest, not worst; "
            "minimize the negative instead"
        )


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
