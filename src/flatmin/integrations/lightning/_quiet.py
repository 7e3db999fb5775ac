"""Logs and metrics that count one pass of a step, not two."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def quiet(trainer: L.Trainer, module: nn.Module) -> Iterator[None]:
    """Inside, ``self.log`` of the modules and callbacks does nothing; on leaving torchmetrics are as they were."""
    metrics = [inner for inner in module.modules() if isinstance(inner, Metric)]
    speakers = [inner for inner in module.modules() if isinstance(inner, L.LightningModule)]
    before = [vars(metric).copy() for metric in metrics]
    spoken = [(vars(each), vars(each).copy()) for each in (*speakers, *trainer.callbacks)]  # type: ignore[attr-defined]
    for metric in metrics:
        for name in metric._defaults:
            setattr(metric, name, _copied(getattr(metric, name)))
    for attributes, _ in spoken:
        attributes.update(log=_silent, log_dict=_silent)
    try:
        yield
    finally:
        for attributes, known in spoken:
            for name in ("log", "log_dict"):
                attributes.pop(name)
                attributes.update({name: known[name]} if name in known else {})
        for metric, known in zip(metrics, before, strict=True):
            vars(metric).clear()
            vars(metric).update(known)


def _silent(*_: Any, **__: Any) -> None:
    """In place of ``log`` and ``log_dict``."""


def _copied(state: Any) -> Any:
    """A state that may be changed in place; a list's tensors never are."""
    return state.clone() if isinstance(state, Tensor) else copy.copy(state)
