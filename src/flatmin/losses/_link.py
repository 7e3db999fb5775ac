"""Says where a criterion takes logits for independent labels, and the loss beside it for those of one class."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._arrival import Arrival

_TRIES = 8  # passes that may give no gradient to look at
_LEAST = 1e-6  # sum of a gradient's sizes, below which it may be rounding alone
_MOVED = 0.05  # share of a gradient by which a sample's logits move together, from which on no softmax has made it


class LinkCheck:
    """Looks once at the gradient of the logits. A copy or a pickle looks anew.

    A softmax does not change when all logits of a sample grow by the same: over the classes, the gradient of a cross
    entropy sums to 0, and so does that of a divergence of softmax outputs. That of independent labels does not. It
    never waits for an accelerator.

    Args:
        name: Whose check it is.
        way: The way out, as far as its last argument.
    """

    def __init__(self, name: str, way: str) -> None:
        self.settled = False
        self._name, self._way = name, way
        self._tries = 0
        self._arrival: Arrival | None = None

    def __call__(self, logits: Tensor, class_dim: int) -> None:
        """Looks at the gradient that ``logits`` will get, or says what was found.

        Args:
            logits: The network's logits, which need a gradient.
            class_dim: Which dimension is the classes'.
        """
        if self.settled or torch.compiler.is_compiling():
            return
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._arrival is None:
            self._tries += 1
            self.settled = self._tries > _TRIES
            self._hook(logits, class_dim)
            return
        if not self._arrival.is_here():
            return
        found, self._arrival = self._arrival.value, None
        if found is None:  # it could not be had without waiting
            self.settled = True
            return
        together, whole = found.tolist()
        if not _LEAST < whole < float("inf"):
            return
        self.settled = True
        if together > _MOVED * whole:
            warnings.warn(
                f"{self._name} compares softmax outputs, and the criterion moves the logits of a sample together, as "
                "no cross entropy over classes does: where a sample may have several labels, or none, "
                f"{self._way}link='sigmoid'), and for a regression {self._way}distance=...) (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrival": None}

    def _hook(self, logits: Tensor, class_dim: int) -> None:
        @torch.no_grad()
        def look(gradient: Tensor | None) -> None:
            if gradient is not None and self._arrival is None and not self.settled:  # DDP's sink may hand on None
                gradient = gradient.float()
                together = gradient.sum(dim=class_dim).abs().sum()
                self._arrival = Arrival(torch.stack([together, gradient.abs().sum()]))

        logits.register_hook(look)  # type: ignore[no-untyped-call]  # torch leaves it without types
