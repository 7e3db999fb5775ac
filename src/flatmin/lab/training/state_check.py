"""Checks that a state from disk fits the objects it is for, before any of them is changed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ..._attached import apart
from ..._checks import check_number
from ...errors import DataError


def check_fit(name: str, found: Any, wanted: Any, *, exact: bool = True) -> None:
    """Checks that ``found`` has the keys, lengths, shapes and dtypes of ``wanted``; values may differ.

    Args:
        name: Name of the state, for the error.
        found: A state that was read: nested dictionaries and lists of tensors and plain values.
        wanted: The current state of the object that is to take it.
        exact: Whether both must have the same keys; otherwise only common keys are compared.

    Raises:
        DataError: If it does not fit; it names the entry.
    """
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or (exact and found.keys() != wanted.keys()):
            odd = sorted(map(str, found.keys() ^ wanted.keys())) if isinstance(found, Mapping) else []
            raise DataError(f"{name} is {_describe(found)}, this run's is {_describe(wanted)}{_named(odd)}")
        for key, value in wanted.items():
            if key in found and not str(key).endswith("_extra_state"):  # torch's name for what a module checks itself
                check_fit(f"{name}.{key}", found[key], value, exact=exact)
    elif isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(wanted):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            check_fit(f"{name}.{number}", one, other, exact=exact)
    elif _describe(found) != _describe(wanted) and (wanted is not None or isinstance(found, (Tensor, Mapping, list))):
        raise DataError(f"{name} is {_describe(found)}, this run's is {_describe(wanted)}")


def check_optimizer(found: Any, optimizer: Optimizer, *, exact: bool) -> None:
    """Checks the state of SGD or AdamW, which have no state to compare with before their first step.

    Other optimizers are left to check their state themselves.

    Raises:
        DataError: If it does not fit; it names the entry.
    """
    if type(optimizer) not in (SGD, AdamW):
        return
    with apart():
        own = optimizer.state_dict()
    anyhow = [{**group, "fused": None} for group in own["param_groups"]]  # another device may choose otherwise
    check_fit("optimizer.param_groups", found["param_groups"], anyhow, exact=exact)
    for number, (group, own_group) in enumerate(zip(found["param_groups"], own["param_groups"], strict=True)):
        constants = {key: value for key, value in own_group.items() if key != "lr"}
        check_values(f"optimizer.param_groups.{number}", group, constants)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, AdamW) else set()
    for number, entries in found["state"].items():
        name = f"optimizer.state.{number}"
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entries, Mapping):
            raise DataError(f"{name} belongs to none of this run's {len(parameters)} parameters")
        if missing := needed - entries.keys():
            raise DataError(f"{name} lacks {', '.join(sorted(missing))}")
        for key, value in entries.items():
            if key == "step":
                check_number(f"{name}.step", value, least=0)
            elif value is not None or key in needed:
                check_fit(f"{name}.{key}", value, parameters[number].detach())


def as_here(found: Any, optimizer: Optimizer) -> Any:
    """A state that `check_optimizer` has checked, with the kernels that this device's optimizer was made with."""
    if type(optimizer) not in (SGD, AdamW):
        return found
    groups = zip(found["param_groups"], optimizer.param_groups, strict=True)
    return {**found, "param_groups": [{**group, "fused": own["fused"]} for group, own in groups]}


def check_values(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks that numbers, alone or in lists, are equal in ``found`` and ``wanted`` where both have them.

    Raises:
        DataError: If one differs; it names the entry.
    """
    for key, value in wanted.items():
        if isinstance(value, (list, tuple)):
            differs = list(found.get(key, value)) != list(value)
        else:
            differs = isinstance(value, (int, float)) and type(value) is not bool and found.get(key, value) != value
        if differs:
            raise DataError(f"{name}.{key} is {found[key]!r:.60}, this run's is {value!r:.60}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return type(value).__name__


def _named(names: list[str]) -> str:
    """Some of the names that only one of the two has."""
    return f"; only one of them has {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "") if names else ""
