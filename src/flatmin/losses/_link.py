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
_LEAST_SHARE = 1e-3  # of a sample's largest gradient, below which one may be rounded
_BENT = 1e-3  # share of a variance that no exponential explains, from which on there is none
_NORMALISED = 1e-3  # largest logarithm of the sum of a sample's probabilities
_NORMALISED_COARSE = 0.05  # in 16 bits
_MARGIN = 3.0  # how much more than the others together, or less, a margin moves the label's logit


class LinkCheck:
    """Looks once at the gradient of the logits. A copy or a pickle looks anew.

    A softmax does not change when all logits of a sample grow by the same: over the classes, the gradient of a cross
    entropy sums to 0, and so does that of a divergence of softmax outputs. That of independent labels does not. Nor
    does that of a margin on the label's angle, as ArcFace has it, which `_has_margin` knows; nor that of logarithms of
    probabilities, as of ``nn.LogSoftmax``, which are logits too. It never waits for an accelerator.

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
                f"{self._way}link='sigmoid'), and for a regression {self._way}distance=...); a margin loss over "
                "classes may stay as it is (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrival": None}

    def _hook(self, logits: Tensor, class_dim: int) -> None:
        values = logits.detach()

        @torch.no_grad()
        def look(gradient: Tensor | None) -> None:
            if gradient is not None and self._arrival is None and not self.settled:  # DDP's sink may hand on None
                gradient = gradient.float()
                together = gradient.sum(dim=class_dim).abs().sum()
                together = together * ~_has_margin(values, gradient, class_dim) * ~_are_normalised(values, class_dim)
                self._arrival = Arrival(torch.stack([together, gradient.abs().sum()]))

        logits.register_hook(look)  # type: ignore[no-untyped-call]  # torch leaves it without types


def _are_normalised(logits: Tensor, class_dim: int) -> Tensor:
    """Whether all are logarithms of probabilities, up to what is rounded. Returns a flag on the device.

    Independent labels come near that where each begins with a probability of one by the number of classes.
    """
    values = logits.float()
    sums = values.logsumexp(dim=class_dim).abs()
    rounded = (values == values.bfloat16()).all() | (values == values.half()).all()  # and made wider since, perhaps
    return ((sums < _NORMALISED) | rounded & (sums < _NORMALISED_COARSE)).all()


def _has_margin(logits: Tensor, gradient: Tensor, class_dim: int) -> Tensor:
    """Whether it is a softmax's gradient in which the label's logit alone moves more, or less, than it would.

    All classes but one are pushed down then, by shares that grow as the exponential of the logits, or faster; those of
    independent labels grow slower. Returns a flag on the device.
    """
    pushed = gradient > _LEAST_SHARE * gradient.amax(dim=class_dim, keepdim=True)
    one = (gradient < 0).sum(dim=class_dim) == (gradient != 0).any(dim=class_dim)
    count = pushed.sum(dim=class_dim, keepdim=True).clamp(min=1)

    def around_mean(values: Tensor) -> Tensor:
        values = values.where(pushed, 0.0)
        return (values - values.sum(dim=class_dim, keepdim=True) / count).where(pushed, 0.0)

    shares, places = around_mean(gradient.log()), around_mean(logits.float())
    slope = (shares * places).sum() / places.square().sum()
    bent = (shares - slope * places).square().sum()
    down, up = gradient.clamp(min=0).sum(), -gradient.clamp(max=0).sum()
    near = (up < _MARGIN * down) & (down < _MARGIN * up)
    return one.all() & near & (slope > 0.99) & (bent < _BENT * shares.square().sum())
