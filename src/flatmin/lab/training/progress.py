"""How far an epoch has come."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import _distributed
from ..._checks import check_integer, check_number


@dataclass(frozen=True)
class StepResult:
    """The losses of a step.

    Attributes:
        loss: The total loss, detached; for most methods at the weights before the step.
        vanilla: The criterion's part of it.
        calls: Number of closure calls.
    """

    loss: Tensor
    vanilla: Tensor
    calls: int


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        steps: Steps done in it.
        samples: Samples seen in it by all ranks.
        calls: Closure calls of its steps.
        seconds: Time spent on it.
        totals: Sums over this rank's samples of the loss and of the criterion's part; on the device.
    """

    steps: int = 0
    samples: int = 0
    calls: int = 0
    seconds: float = 0.0
    totals: Tensor = field(default_factory=lambda: torch.zeros(2))

    def add(self, step: StepResult, share: int, samples: int, seconds: float) -> None:
        """Adds a step, with its samples on this rank and on all ranks, and the time the epoch has taken so far."""
        self.totals += torch.stack([step.loss, step.vanilla]) * share
        self.calls += step.calls
        self.samples += samples
        self.steps += 1
        self.seconds = seconds

    def means(self) -> tuple[float, float]:
        """Mean loss and mean criterion over all ranks."""
        loss, vanilla = (_distributed.total(self.totals.clone()) / self.samples).tolist()
        return loss, vanilla

    def state_dict(self) -> dict[str, Any]:
        """Returns the part that is the same on all ranks, as plain values."""
        return {"steps": self.steps, "samples": self.samples, "calls": self.calls, "seconds": self.seconds}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], totals: Tensor) -> "Progress":
        """Takes what `state_dict` returned, and this rank's totals.

        Raises:
            InvalidArgumentError: If a value is impossible.
        """
        return cls(
            check_integer("steps", state["steps"], least=0),
            check_integer("samples", state["samples"], least=0),
            check_integer("calls", state["calls"], least=0),
            check_number("seconds", state["seconds"], least=0),
            totals,
        )
