"""Several torch optimizers of different parameters as one, such as Muon for the matrices and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InvalidArgumentError

State = dict[str, Any]
EXTRA = "extra"  # the key of what an optimizer's state dict has beside state and param_groups


class Joined(Optimizer):
    """One optimizer with the parameter groups and the state of several; its step is a step of each.

    All is read from them, and set in them, whenever it is used. The parameters are counted through, so that its
    ``state_dict`` is like that of one optimizer.

    Args:
        optimizers: They have no parameter in common.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        known: set[Tensor] = set()
        for optimizer in optimizers:
            own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            if own & known:
                raise InvalidArgumentError(
                    f"base_optimizer: {type(optimizer).__name__} has a parameter of another one in the list; give each "
                    "parameter to one of them"
                )
            known |= own
        super().__init__([group for each in optimizers for group in each.param_groups], {})  # makes the hooks alone
        self.optimizers = tuple(optimizers)

    # torch's constructor sets these three, and adds the groups, before there are optimizers: nothing to do then.

    @property
    def param_groups(self) -> list[State]:
        """The groups of the optimizers, one after the other."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[State]) -> None:
        if "optimizers" in self.__dict__:
            for optimizer, own in zip(self.optimizers, self._divided(groups), strict=True):
                optimizer.param_groups = own

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter, in the optimizer that trains it."""
        return cast("defaultdict[Tensor, Any]", _States(self.optimizers))

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "optimizers" in self.__dict__:
            for optimizer in self.optimizers:
                own = [p for group in optimizer.param_groups for p in group["params"] if p in state]
                optimizer.state = defaultdict(dict, {parameter: state[parameter] for parameter in own})

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the first optimizer those that all have."""
        first, *rest = self.optimizers
        return {key: value for key, value in first.defaults.items() if all(key in each.defaults for each in rest)}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if "optimizers" in self.__dict__:
            for optimizer in self.optimizers:
                optimizer.defaults = {key: defaults.get(key, value) for key, value in optimizer.defaults.items()}

    def add_param_group(self, param_group: State) -> None:
        """Refused: nobody knows which of them is meant."""
        if "optimizers" in self.__dict__:
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise InvalidArgumentError(
                f"add_param_group: there are several base optimizers ({names}); add the group to the one that is to "
                "train it, and it is perturbed like the others"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps with each."""
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> State:
        """Returns the states as one, with the parameters counted through."""
        return saved(self, self._state)

    def load_state_dict(self, state_dict: State) -> None:
        """Loads what `state_dict` returned, into all or none."""
        loaded(self, state_dict, self._load)

    def __getstate__(self) -> State:
        return attributes(self)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.optimizers))}]"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What only one of them has; a method that several have is called on each, such as ``eval``."""
            own = (
                []
                if name.startswith("_")
                else [each for each in self.__dict__.get("optimizers", ()) if hasattr(each, name)]
            )
            if len(own) == 1:
                return getattr(own[0], name)
            found = [getattr(each, name) for each in own]
            if not found or not all(map(callable, found)):
                several = ": several have one, take it of one of them" if found else ""
                raise AttributeError(f"{self!r} has no attribute {name!r}{several}")

            def each(*args: Any, **kwargs: Any) -> None:
                for method in found:
                    method(*args, **kwargs)

            return each

    def _state(self) -> State:
        states, first = [optimizer.state_dict() for optimizer in self.optimizers], 0
        joined: State = {"state": {}, "param_groups": []}
        for state in states:
            joined["state"] |= {first + index: entries for index, entries in state["state"].items()}
            for group in state["param_groups"]:
                joined["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
            first += sum(len(group["params"]) for group in state["param_groups"])
        extra = [{key: part for key, part in state.items() if key not in joined} for state in states]
        return {**joined, EXTRA: extra} if any(extra) else joined

    def _load(self, state_dict: State) -> None:
        groups, extra = state_dict["param_groups"], state_dict.get(EXTRA, [{}] * len(self.optimizers))
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise InvalidArgumentError(
                "state_dict has other parameter groups than the base optimizers together; load it into the same "
                "optimizers in the same order"
            )
        states, first = state_dict["state"], 0
        for optimizer, own, more in zip(self.optimizers, self._divided(groups), extra, strict=True):
            moved = [{**group, "params": [index - first for index in group["params"]]} for group in own]
            last = first + sum(len(group["params"]) for group in own)
            state = {index - first: states[index] for index in range(first, last) if index in states}
            optimizer.load_state_dict({**more, "state": state, "param_groups": moved})
            first = last

    def _divided(self, groups: list[State]) -> list[list[State]]:
        """Groups by optimizer."""
        counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        if len(groups) != sum(counts):
            raise InvalidArgumentError(
                f"param_groups: several base optimizers have {sum(counts)} together, got {len(groups)}; set those of "
                "one of the optimizers"
            )
        rest = iter(groups)
        return [[next(rest) for _ in range(count)] for count in counts]


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one mapping."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, entries: Any) -> None:
        self._of(parameter)[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        return self[parameter] if parameter in self else default  # noqa: SIM401 this is what it is made of

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for optimizer in self._optimizers for parameter in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def _of(self, parameter: Tensor) -> defaultdict[Tensor, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state or any(
                parameter is own for group in optimizer.param_groups for own in group["params"]
            ):
                return optimizer.state
        raise KeyError(parameter)


def saved(optimizer: Optimizer, make: Callable[[], State]) -> State:
    """The state dict that ``make`` returns, with torch's hooks of ``optimizer``."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    state = make()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state)
        state = state if changed is None else changed
    return state


def loaded(optimizer: Optimizer, state_dict: State, load: Callable[[State], None]) -> None:
    """Loads a state dict by ``load``, with torch's hooks of ``optimizer``."""
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    load(state_dict)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def attributes(optimizer: Optimizer) -> State:
    """What a copy has: torch's own leaves out what a subclass adds; hooks, and a patched step, belong to the object."""
    return {k: v for k, v in vars(optimizer).items() if k != "step" and not k.startswith("_optimizer_")}
