"""A history by name, or by size."""

import logging
from pathlib import Path

import torch

from .. import _distributed
from .._checks import check_choice, check_path, shown
from ..errors import InvalidArgumentError
from ._codec import Codec
from ._dense import Dense
from ._history import History, check_sizes
from ._lowrank import LowRank
from ._memory import physical_memory
from ._quantized import Quantized
from ._store import TAG_BYTES
from ._topk import TopK

MEAN_MOMENTUM = 0.9
# With "auto" the history may take this share of the memory it will live in; the first codec that does is taken.
SHARE = 1 / 8

CODECS: dict[str, Codec] = {
    "dense": Dense(),
    "half": Dense(torch.float16),
    "int8": Quantized(8),
    "int6": Quantized(6),
    "int4": Quantized(4),
    "topk": TopK(),
    "lowrank": LowRank(),
    "mean": Dense(),
}
# What "auto" may choose, the most exact first.
AUTO, AUTO_MEAN = ("dense", "half", "int8", "int6", "lowrank"), ("dense", "half", "int8")

logger = logging.getLogger("flatmin")


def make_history(
    history: str | Codec,
    num_samples: int,
    num_classes: int,
    *,
    lag: int | None = None,
    momentum: float | None = None,
    temperature: float = 5.0,
    path: str | Path | None = None,
    location: str = "device",
    sharing: str = "auto",
    grown: bool = False,
) -> History:
    """Makes a history from a name or a codec.

    Args:
        history: A codec, or a name: "dense", "half", "int8", "int6", "int4", "topk", "lowrank"; "mean" for a running
            mean; "auto" for the most exact one that takes at most an eighth of the memory it will live in, the
            accelerator's or else this machine's. The logger "flatmin" tells which one "auto" takes, and why.
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        lag: Compare each row with the one from ``lag`` epochs earlier. None: 3, or a running mean.
        momentum: Momentum of the running mean, in [0, 1). None: no mean, or 0.9 with "mean".
        temperature: Temperature of the loss, > 0.
        path: A folder for a scratch file, see `History`.
        location: "device" or "host", see `History`.
        sharing: "replicate", "shard" or "auto", see `History`.
        grown: Whether a state of fewer samples may be loaded, see `History`.

    Raises:
        InvalidArgumentError: (a ValueError) if there is no such name, or the arguments exclude each other.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> from flatmin.history import make_history
        >>> make_history("lowrank", num_samples=1000, num_classes=1000).row_bytes
        96
    """
    if isinstance(history, str):
        check_choice("history", history, (*CODECS, "auto"))
    elif not isinstance(history, Codec):
        raise InvalidArgumentError(
            f"history must be a name or a codec, such as 'int6' or flatmin.history.LowRank(rank=64), "
            f"got {shown(history)}"
        )
    path = check_path("path", path)
    if history == "mean" and momentum is None:
        momentum = MEAN_MOMENTUM
    if history == "auto":
        if path is not None:
            raise InvalidArgumentError(f"path={str(path)!r} and history='auto' exclude each other: name the form")
        chosen = _choose(*check_sizes(num_samples, num_classes, lag, momentum), on_host=location == "host")
        history = str(_distributed.from_first(chosen))
    return History(
        CODECS[history] if isinstance(history, str) else history,
        num_samples,
        num_classes,
        lag=lag,
        momentum=momentum,
        temperature=temperature,
        path=path,
        location=location,
        sharing=sharing,
        grown=grown,
    )


def _choose(num_samples: int, num_classes: int, lag: int, momentum: float | None, *, on_host: bool) -> str:
    """Names the most exact codec that takes a fair share of the memory, and logs why."""
    where, memory = _memory(on_host)
    sizes: dict[str, int] = {}
    for name in AUTO if momentum is None else AUTO_MEAN:
        if name == "lowrank" and num_classes <= LowRank().rank:
            continue
        codec = CODECS[name].bind(num_classes, lag=lag, temperature=1.0, momentum=momentum)
        learnt = sum(buffer.nbytes for buffer in codec.buffers())
        sizes[name] = lag * num_samples * (codec.row_bytes + TAG_BYTES) + learnt
        if sizes[name] <= SHARE * memory:
            reason = "the most exact within"
            break
    else:
        name, reason = min(sizes, key=sizes.__getitem__), "the smallest, and more than"
    logger.info(
        "history %r: %.3g GB, %s an eighth of the %.3g GB of %s", name, sizes[name] / 1e9, reason, memory / 1e9, where
    )
    return name


def _memory(on_host: bool) -> tuple[str, int]:
    if torch.cuda.is_available() and not on_host:
        return "the GPU", torch.cuda.mem_get_info()[1]
    return "main memory", physical_memory() or 8 * 2**30
