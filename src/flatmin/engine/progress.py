"""How far an epoch has come."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer, check_number


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        steps: Steps done in it.
        samples: Samples seen in it.
        seconds: Time spent on it.
        totals: Sums over these samples of the loss and of the criterion's part of it; stays on the device.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    totals: Tensor = field(default_factory=lambda: torch.zeros(2))

    def add(self, losses: tuple[Tensor, Tensor], samples: int, seconds: float) -> None:
        """Notes a step: its two losses, its samples, and the time that the epoch has taken so far."""
        self.totals += torch.stack(losses) * samples
        self.samples += samples
        self.steps += 1
        self.seconds = seconds

    def means(self) -> tuple[float, float]:
        """The mean loss and criterion."""
        loss, vanilla = (self.totals / self.samples).tolist()
        return loss, vanilla

    def state_dict(self) -> dict[str, Any]:
        """Returns it as tensors and plain values."""
        return {"steps": self.steps, "samples": self.samples, "seconds": self.seconds, "totals": self.totals}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "Progress":
        """Takes what `state_dict` returned.

        Raises:
            InvalidArgumentError: If it has values that no epoch has.
        """
        return cls(
            check_integer("steps", state["steps"], least=0),
            check_integer("samples", state["samples"], least=0),
            check_number("seconds", state["seconds"], least=0),
            state["totals"].to(device, copy=True),
        )
