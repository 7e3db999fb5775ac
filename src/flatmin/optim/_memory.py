"""What an optimizer remembers of each parameter beside its base optimizer's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import check_mapping
from ..errors import StateDictError
from ._foreach import put_back_


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

    def commit(self, bad: Tensor | None = None) -> None:
        """The step is made; where a flag on the device is True, it is dropped."""
        for name, alone, tensors in self._staged:
            if bad is not None:
                old = self._tensors.get(name, {})
                before = [old[p] if p in old else torch.zeros_like(p) for p in tensors]
                put_back_(list(tensors.values()), before, bad)  # nobody else has these yet
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
            StateDictError: If it belongs to other parameters.
        """
        parameters, memory = _parameters(groups), cls()
        for index, entries in check_mapping("state_dict['flatmin']['state']", state).items():
            if not isinstance(index, int) or not 0 <= index < len(parameters):
                raise StateDictError(
                    f"state_dict['flatmin'] has a parameter {index!r:.60}, and there are {len(parameters)}; "
                    "load it into an optimizer of the same parameters"
                )
            parameter = parameters[index]
            for name, tensor in check_mapping(f"state_dict['flatmin']['state'][{index}]", entries).items():
                if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                    found = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"{tensor!r:.60}"
                    raise StateDictError(
                        f"state_dict['flatmin'] has {name} {found} for parameter {index} of "
                        f"shape {tuple(parameter.shape)}; load it into an optimizer of the same parameters"
                    )
                own = tensor.detach().to(device=parameter.device, dtype=parameter.dtype)
                memory.put(name, [parameter], [own])
        memory.commit()
        return memory


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
