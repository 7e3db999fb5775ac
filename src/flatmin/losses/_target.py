"""How MESA runs the average of a network: on which samples, in which modes, in which precision."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..averages._average import evaluating
from ..averages._copy import without_hooks_of
from ..averages._statistics import own_statistics
from ..errors import InvalidArgumentError
from ._outputs import are_labels
from ._share import random_share

IN_PART = (
    "the drawn samples are taken of every tensor whose first dimension is the batch's, {}; leave out fraction where "
    "others have a place for each sample too, such as sequences with time first, hidden states or the text of an "
    "EmbeddingBag with offsets, or where that is a dimension of something else"
)


@dataclass(frozen=True)
class Target:
    """Runs an average, without gradient and in evaluation mode.

    Attributes:
        average: What is called.
        networks: The averaged network itself, and the one that is trained.
        owned: Whether the average was made by flatmin, without the network's hooks.
        statistics: As of `MESA`; so are the next two.
        fraction: Share of each batch.
        autocast: None: the caller's.
        outputs: Takes the logits from what the average returns.
    """

    average: nn.Module
    networks: tuple[nn.Module, nn.Module]
    owned: bool
    statistics: str
    fraction: float
    autocast: torch.dtype | None
    outputs: Callable[[Any], Any]

    def share(self, number: tuple[int, int]) -> Tensor | None:
        """The samples of a call that it is run on, see `random_share`; None: all, and then nothing is drawn.

        ``number`` is the call's own, and the size of its batch.
        """
        seed, batch = number
        return None if (size := self.size(batch)) == batch else random_share(batch, size, seed)

    def size(self, batch: int) -> int:
        """How many samples of a batch it is run on."""
        least = 2 if self.statistics == "batch" else 1  # a single sample has no statistics
        return min(batch, max(least, round(self.fraction * batch)))

    @property
    def device(self) -> torch.device:
        """Where the average is."""
        return next(self.networks[0].parameters()).device

    def precision(self) -> torch.dtype | None:
        """The dtype of autocast that it runs under; None: without."""
        kind = self.device.type
        if self.autocast is None and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.autocast

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor, *, part: bool = False) -> Any:
        """What it makes of the batch of which the network has made ``logits``, or of ``part`` of it.

        Raises:
            InvalidArgumentError: If it was given the batch's labels, or part of the batch, with which it fails.
        """
        with nullcontext() if self.autocast is None else torch.autocast(logits.device.type, self.autocast):
            labels = not torch.compiler.is_compiling() and are_labels(logits, args, kwargs)
            if torch.compiler.is_compiling() or not (labels or part):
                return self.inside(self.average, args, kwargs)
            try:
                return self.inside(self.average, args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not labels:
                    why = str(error).partition("\n")[0] or type(error).__name__
                    what = f"the average's forward pass fails on a fraction of the batch ({why})"
                    raise InvalidArgumentError(f"{what}: {IN_PART.format(len(logits))}") from error
                raise InvalidArgumentError(
                    "the average's forward pass fails with what MESA was given, integers of the shape of labels: it "
                    "takes no labels, and what the network was called with, mesa(logits, x)"
                ) from error

    def inside(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``call``, which calls the average, makes of a batch, under whatever autocast is on."""
        own = own_statistics(*self.networks) if self.statistics == "batch" else nullcontext()
        hooks = nullcontext() if self.owned else without_hooks_of(*self.networks)
        with evaluating(self.average), own, hooks:
            return self.outputs(call(*args, **kwargs))
