"""What a method remembers of each parameter, apart from the base optimizer's state of it.

Apart, because torch's optimizers set up their own state only where there is none yet.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InvalidArgumentError


class Memory:
    """Tensors by name and parameter. None is ever changed in place, so that states can share them."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[Tensor, Tensor]] = {}

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
        """Remembers ``tensors`` themselves, not copies of them, beside those of other parameters."""
        self._tensors.setdefault(name, {}).update(zip(parameters, tensors, strict=True))

    def replace(self, name: str, parameters: list[Tensor], tensors: list[Tensor]) -> None:
        """Remembers ``tensors`` in place of all that there was under ``name``."""
        self._tensors[name] = dict(zip(parameters, tensors, strict=True))

    def state_dict(self, groups: list[dict[str, Any]]) -> dict[int, dict[str, Tensor]]:
        """Returns it by the number of the parameter in ``groups``, as torch's optimizers do."""
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(_parameters(groups)):
            entries = {name: known[parameter] for name, known in self._tensors.items() if parameter in known}
            if entries:
                state[number] = entries
        return state

    @classmethod
    def from_state(cls, state: Mapping[int, Mapping[str, Tensor]], groups: list[dict[str, Any]]) -> "Memory":
        """Makes one of what `state_dict` returned, on the device and with the dtype of each parameter.

        Raises:
            InvalidArgumentError: If it belongs to other parameters.
        """
        parameters, memory = _parameters(groups), cls()
        for number, entries in state.items():
            if not 0 <= number < len(parameters):
                raise InvalidArgumentError(
                    f"state_dict['flatmin'] has a parameter {number}, and there are {len(parameters)}; "
                    "load it into an optimizer of the same parameters"
                )
            parameter = parameters[number]
            for name, tensor in entries.items():
                if tensor.shape != parameter.shape:
                    raise InvalidArgumentError(
                        f"state_dict['flatmin'] has {name} of shape {tuple(tensor.shape)} for parameter {number} of "
                        f"shape {tuple(parameter.shape)}; load it into an optimizer of the same parameters"
                    )
                own = tensor.detach().to(device=parameter.device, dtype=parameter.dtype)
                memory.put(name, [parameter], [own])
        return memory


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
