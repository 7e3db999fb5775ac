"""A history by name."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._checks import check_choice
from ..errors import InvalidArgumentError
from ._base import History
from ._dense import DenseHistory
from ._lowrank import RANK as LOW_RANK
from ._lowrank import LowRankHistory
from ._memory import physical_memory
from ._quantized import QuantizedHistory
from ._ranks import Ranks
from ._topk import TopKHistory

LAG = 3
MEAN_MOMENTUM = 0.9
# With "auto", the history may take this share of the memory it will live in, and the first of these that does is taken.
SHARE = 1 / 8

FORMS: dict[str, tuple[Callable[..., History], dict[str, Any]]] = {
    "dense": (DenseHistory, {}),
    "half": (DenseHistory, {"dtype": torch.float16}),
    "int8": (QuantizedHistory, {"bits": 8}),
    "int6": (QuantizedHistory, {"bits": 6}),
    "int4": (QuantizedHistory, {"bits": 4}),
    "topk": (TopKHistory, {}),
    "lowrank": (LowRankHistory, {}),
    "mean": (DenseHistory, {}),
}

logger = logging.getLogger("flatmin")


def make_history(
    name: str,
    num_samples: int,
    num_classes: int,
    *,
    lag: int | None,
    temperature: float,
    momentum: float | None = None,
    path: str | Path | None = None,
) -> History:
    """Makes a history of a form that has a name.

    Args:
        name: One of `FORMS`, or "auto": the most exact one that takes at most an eighth of the accelerator's memory, or
            of this machine's where there is none. Which, and why, is said to the logger "flatmin".
        num_samples: Number of samples.
        num_classes: Number of classes.
        lag: Number of epochs between writing and reading; None for 3, or for a mean.
        temperature: That of the loss.
        momentum: Of the mean; None for none, or for .9 with "mean".
        path: A folder for a scratch file, see `History`.

    Raises:
        InvalidArgumentError: If there is no such form, or it cannot be combined so.
        OutputError: If ``path`` cannot be written or has no room.
    """
    check_choice("history", name, (*FORMS, "auto"))
    if name == "mean" and momentum is None:
        momentum = MEAN_MOMENTUM
    if lag is not None and momentum is not None:
        raise InvalidArgumentError(f"lag={lag} and momentum={momentum} exclude each other: a mean is of all epochs")
    if name == "auto":
        if path is not None:
            raise InvalidArgumentError(f"path={str(path)!r} and history='auto' exclude each other: name the form")
        name = Ranks().from_first(_choose(num_samples, num_classes, lag or LAG, mean=momentum is not None))
    kind, arguments = FORMS[name]
    if kind in (DenseHistory, QuantizedHistory):
        return kind(num_samples, num_classes, lag=lag or LAG, momentum=momentum, path=path, **arguments)
    if momentum is not None:
        raise InvalidArgumentError(
            f"momentum={momentum} and history={name!r} exclude each other: a mean is kept in 'dense', 'half' or 'int8'"
        )
    if kind is TopKHistory:
        arguments = {"temperature": temperature}
    return kind(num_samples, num_classes, lag=lag or LAG, path=path, **arguments)


def _choose(num_samples: int, num_classes: int, lag: int, *, mean: bool) -> str:
    """The name of the most exact form that takes a fair share of the memory, and in the log why."""
    row_bytes = {"dense": 4 * num_classes, "half": 2 * num_classes, "int8": num_classes + 2}
    sizes = {name: (1 if mean else lag) * num_samples * (each + 4) for name, each in row_bytes.items()}
    if not mean:
        sizes["int6"] = lag * num_samples * (-(-num_classes * 6 // 8) + 6)
        if num_classes > LOW_RANK:
            bases = 4 * num_classes * (LOW_RANK + 1) * (lag + 2)
            sizes["lowrank"] = lag * num_samples * (LOW_RANK + 8) + bases
    where, memory = _memory()
    fitting = [name for name, size in sizes.items() if size <= SHARE * memory]
    name = fitting[0] if fitting else min(sizes, key=sizes.__getitem__)
    reason = "the most exact within" if fitting else "the smallest, and more than"
    logger.info(
        "history %r: %.3g GB, %s an eighth of the %.3g GB of %s", name, sizes[name] / 1e9, reason, memory / 1e9, where
    )
    return name


def _memory() -> tuple[str, int]:
    if torch.cuda.is_available():
        return "the GPU", torch.cuda.mem_get_info()[1]
    return "main memory", physical_memory() or 8 * 2**30
