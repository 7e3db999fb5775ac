"""LAWA: the mean of a network's weights at the ends of its last epochs, evaluated in its place.

*Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*, Kaddour 2022,
arXiv 2209.14981::

    average_e = 1/k * sum of the models at the ends of epochs e - k + 1 ... e
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._attached import Attachment, attach
from .._checks import Bounds
from .._warn import depth_in_package
from ..errors import FlatminWarning
from ._base import WeightAverage
from ._modes import in_modes_of
from ._pairs import Kind, pairs
from ._spectral import renew_vectors

BOUNDS = Bounds(integer=True, least=1, most=100_000)  # of k


class LAWA(WeightAverage):
    """Keeps the weights of the last ``k`` epochs' ends and their mean; training is not touched. No pass, k + 1 copies.

    ``average_e = 1/k * sum of the models at the ends of epochs e - k + 1 ... e``, or of all if there are less than k.

    Call `update` after each epoch, before the evaluation.

    Args:
        model: The network that is trained, already on its device, wrapped or not. It is copied.
        k: Number of epochs, at least 1; 6 in the paper.
        statistics: Which batch-norm statistics the average has, see `WeightAverage`.

    Attributes:
        module: The averaged network itself.
        n_averaged: 1 plus the number of updates, int64.

    Raises:
        InvalidArgumentError: (a ValueError) if ``k`` is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> lawa = flatmin.LAWA(model, k=2)
        >>> for value in (1.0, 2.0, 4.0):  # three epochs
        ...     _ = torch.nn.init.constant_(model.bias, value)
        ...     lawa.update()
        >>> lawa.module.bias.tolist()
        [3.0, 3.0, 3.0]
    """

    def __init__(self, model: nn.Module, *, k: int = 6, statistics: str = "averaged") -> None:
        self.k = int(BOUNDS.check("k", k))
        super().__init__(model, statistics=statistics)
        self._stepped = False  # whether an optimizer that it is attached to has made a step
        # A slot for each of the last k epochs, as buffers, so that they are saved and moved with the module.
        averaged = [pair for pair in pairs(self.module, model) if pair.kind not in (Kind.COPIED, Kind.VECTORS)]
        self._slots = {pair.name: f"past_{number}" for number, pair in enumerate(averaged)}
        for pair in averaged:
            self.register_buffer(self._slots[pair.name], pair.ours.new_zeros((self.k, *pair.ours.shape)))

    @torch.no_grad()
    def update(self) -> None:
        """Records the network's weights in place of the oldest and takes the mean. Call it after each epoch.

        Raises:
            InvalidArgumentError: If the network was sharded and the average was not.
        """
        self._loads.check(self.model, self.module, self)
        epochs = int(self.n_averaged) - 1  # before this one; the network it was made from is no epoch's end
        self.n_averaged += 1
        with in_modes_of(self.module, self.model):
            for pair in pairs(self.module, self.model):
                if pair.kind is Kind.VECTORS or (pair.kind is Kind.STATISTICS and self.statistics == "fresh"):
                    continue
                pair.ours.copy_(pair.theirs)
                past: Tensor | None = getattr(self, self._slots.get(pair.name, ""), None)
                if past is None or pair.kind is Kind.COPIED or past.shape[1:] != pair.ours.shape:
                    continue  # a buffer that the network has made or resized since
                past[epochs % self.k].copy_(pair.ours)
                last = past[: min(epochs + 1, self.k)]
                mean = last.mean(dim=0)
                if pair.kind is Kind.STATE:  # copied where it is not finite, or does not move
                    mean = torch.where(mean.isfinite() & (last != pair.ours).any(dim=0), mean, pair.ours)
                pair.ours.copy_(mean)
            renew_vectors(self.module, iterations=15)  # as many as spectral_norm makes at first

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Saves and loads the average with ``optimizer``; `update`, at the ends of epochs, stays yours to call.

        Attach before a checkpoint is loaded.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return attach(self, optimizer, network=self.model, after_step=type(self)._note_step)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged network, in evaluation mode and without gradient."""
        if self._stepped and not self._warned and int(self.n_averaged) == 1:
            self._warned = True
            warnings.warn(
                "LAWA averages the ends of epochs, of which an optimizer knows nothing, and has never been updated: "
                "call lawa.update() after each epoch",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
        return super().forward(*args, **kwargs)

    def _note_step(self) -> None:
        self._stepped = True

    def extra_repr(self) -> str:
        """Shows the number of epochs when printed."""
        return f"k={self.k}"
