"""A torch optimizer around another one."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .._attached import warn_of_unattached
from .._checks import check_mapping, loading
from .._privacy import check_not_private
from ..errors import InvalidArgumentError
from ._joined import Joined, attributes, loaded, saved

OWN = "flatmin"  # the key of what is not the base optimizer's in a state dict


class Wrapper(Optimizer, ABC):
    """An optimizer whose ``param_groups``, ``state`` and ``defaults`` are those of the one that it wraps.

    They are read from it, and set in it, whenever they are used; so whatever is done to either is done to both.

    Args:
        base_optimizer: The optimizer, an instance; or several, which are joined.

    Raises:
        InvalidArgumentError: (a ValueError) if it cannot be wrapped.
    """

    base_optimizer: Optimizer

    def __init__(self, base_optimizer: Optimizer | Sequence[Optimizer]) -> None:
        base = as_one(base_optimizer)
        super().__init__(base.param_groups, base.defaults)  # makes the hooks; sets nothing below
        self.base_optimizer = base

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
        return saved(self, lambda: {**self.base_optimizer.state_dict(), OWN: self._own_state()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a plain optimizer's state fits too, and begins at step 0.

        Raises:
            StateDictError: (a ValueError and a RuntimeError) If it is none, or of other optimizers.
        """
        check_mapping("state_dict", state_dict)
        loaded(self, state_dict, self._load_parts)

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What there is beside the base optimizer's state."""

    @abstractmethod
    def _load(self, base: dict[str, Any], own: dict[str, Any]) -> None:
        """Loads the base optimizer's state, and what `_own_state` returned or nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return attributes(self)

    if not TYPE_CHECKING:

        def __new__(cls, *arguments: Any, **keywords: Any) -> "Wrapper":
            """Names the way out where somebody calls it as another library's SAM is called."""
            if arguments or keywords:  # a copy has none
                check_call(cls, arguments, keywords)
            return super().__new__(cls)

        def __getattr__(self, name: str) -> Any:
            """What the base optimizer has beside all that optimizers have, such as ``train`` and ``eval``."""
            if name.startswith("_") or not self._has_base():
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            try:
                return getattr(self.base_optimizer, name)
            except AttributeError as error:
                way = _ELSEWHERE.get(name, f"its base: {error}")
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; {way}") from None

    def _load_parts(self, state_dict: dict[str, Any]) -> None:
        check_mapping("state_dict", state_dict, "state", "param_groups")
        check_mapping("state_dict['state']", state_dict["state"])
        own = dict(check_mapping(f"state_dict[{OWN!r}]", state_dict.get(OWN, {})))
        warn_of_unattached(state_dict, self.base_optimizer)
        with loading(f"this {type(self).__name__}"):
            self._load({name: part for name, part in state_dict.items() if name != OWN}, own)

    def _has_base(self) -> bool:
        return "base_optimizer" in self.__dict__


# Methods that other libraries' optimizers have.
_ELSEWHERE = {
    "set_closure": "give the closure to step(closure)",
    "update_rho_t": "give rho= a function of the base optimizer, such as flatmin.optim.RhoByLR",
}
# transformers' Trainer makes optimizer_cls_and_kwargs of groups of parameters.
_IN_TRAINER = (
    "; in transformers' Trainer give sharpness=partial(flatmin.SAM, rho=0.05) to the mixin "
    "flatmin.integrations.transformers.Sharpness"
)


def check_call(kind: type, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
    """Raises Python's TypeError for arguments that a constructor does not take, and says how it is called."""
    takes = signature(kind.__init__)  # type: ignore[misc]
    try:
        takes.bind(None, *arguments, **keywords)
    except TypeError as error:
        name, own = kind.__name__, [each.name for each in takes.parameters.values() if each.kind is each.KEYWORD_ONLY]
        raise TypeError(
            f"{name}: {error}; write {name}(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05): what belongs to "
            f"the optimizer inside, such as lr, is given to that one, and {name}'s own arguments by name: "
            + ", ".join(own)
            + ("; adaptive=True is flatmin.ASAM" if "adaptive" in keywords and name != "ASAM" else "")
        ) from None


def as_one(base: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """Returns the base optimizer, or several as one."""
    if not isinstance(base, (list, tuple)):
        check_base(base)
        return base  # type: ignore[return-value]  # which is checked
    wrong = [type(each).__name__ for each in base if not isinstance(each, Optimizer)]
    if wrong or not base:
        got = f"{type(base).__name__} of {wrong[0] if wrong else 'nothing'}"
        raise InvalidArgumentError(
            f"base_optimizer must be a torch.optim.Optimizer, got {got}; write torch.optim.AdamW(parameters), or a "
            "list of such optimizers" + (_IN_TRAINER if wrong[:1] == ["dict"] else "")
        )
    for each in base:
        check_base(each)
    return base[0] if len(base) == 1 else Joined(base)


def check_base(base: object) -> None:
    """Checks that ``base`` is a torch optimizer that can be wrapped, and can step without a closure."""
    if isinstance(base, type):
        raise InvalidArgumentError(
            f"base_optimizer must be an instance, got the class {base.__name__}; "
            f"write {base.__name__}(model.parameters(), lr=...)"
        )
    kind = type(base).__name__
    if not isinstance(base, Optimizer):
        raise InvalidArgumentError(
            f"base_optimizer must be a torch.optim.Optimizer, got {kind}; write torch.optim.SGD(model.parameters(), "
            "lr=0.1)"
        )
    check_not_private(base)
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
    check_minimizes(base)


def check_minimizes(base: Optimizer) -> None:
    """Refuses a parameter group that maximizes; one may come later, with a state or by ``add_param_group``."""
    if any(group.get("maximize") for group in base.param_groups):
        raise InvalidArgumentError(
            "base_optimizer has maximize=True, and the weights would be moved to where that is easiest, not worst; "
            "minimize the negative instead"
        )
