"""Notices a training that has no loss to learn from: none is finite from the first step on."""

import math

import torch
from torch import Tensor

from ... import _distributed
from ...errors import DivergedError
from .progress import Progress

JUDGED = 50  # steps


class FirstLosses:
    """Ends a run if no loss of its first 50 steps is finite, or none of the first epoch if that is shorter.

    A single finite one is enough for the run to go on: what diverges later keeps its epochs, and is said to have
    diverged. A run that is continued in the middle of its first epoch is not judged.

    Args:
        device: Where the losses are; it is waited for once.
    """

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.zeros((), device=device)
        self._seen = 0
        self._watching = False

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Says which epoch begins, and how many steps of it are done already."""
        self._watching = epoch == 0 and steps == 0

    def add(self, loss: Tensor) -> bool:
        """Takes the loss of a step, and returns whether it is time to `judge`."""
        if self._watching:
            self._finite += loss.isfinite()
            self._seen += 1
        return self._watching and self._seen == JUDGED

    def judge(self, progress: Progress, lr: float, precision: str, extra_bytes: int) -> None:
        """Raises if no loss was finite on any rank; afterwards no more are looked at.

        Args:
            progress: How far the epoch has come.
            lr: Its learning rate.
            precision: The recipe's.
            extra_bytes: The method's.

        Raises:
            DivergedError: If so, with the metrics of a run that has learnt nothing.
        """
        if not self._watching:
            return
        self._watching = False
        if _distributed.total(self._finite.clone()) > 0:
            return
        calls = progress.calls / progress.steps
        raise DivergedError(
            f"the loss was not finite in any of the first {self._seen} steps, so nothing can be learnt: lower the "
            f"learning rate (it is {lr:g}), look for inputs, weights or a criterion that give NaN or infinity, or "
            f"take precision float32 (it is {precision})",
            {
                "epoch": 0,
                **dict.fromkeys(("train_loss", "train_loss_vanilla", "test_loss"), math.nan),
                "test_accuracy": 0.0,
                "lr": lr,
                "seconds": progress.seconds,
                "closure_calls": calls,
                "mean_closure_calls": calls,
                "extra_bytes": extra_bytes,
            },
        )
