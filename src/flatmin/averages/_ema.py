"""The exponential moving average of a network's weights, evaluated in its place.

::

    average_t = decay * average_(t-1) + (1 - decay) * model_t
"""

import torch
from torch import nn
from torch.optim import Optimizer

from .._attached import Attachment, attach
from .._checks import check_number
from ._average import move, warn_if_too_coarse
from ._base import WeightAverage, warn_if_updated_twice


class EMA(WeightAverage):
    """Keeps the exponential moving average of the weights; training is not touched. No pass, one copy of the network.

    ``average_t = decay * average_(t-1) + (1 - decay) * model_t``, started at the model's weights.

    Call `update` after each ``optimizer.step()``, or `attach` once. Evaluate the average with ``ema(x)``, save or
    deploy ``ema.module``. `flatmin.MESA` can use it as its target: ``MESA(model, average=ema)``.

    Args:
        model: The network that is trained, already on its device, wrapped or not. It is copied.
        decay: Decay of the average, in (0, 1); `ema_decay` makes it from a horizon in epochs.
        statistics: Which batch-norm statistics it has, see `WeightAverage`.

    Attributes:
        module: The averaged network itself.
        n_averaged: 1 plus the number of updates, int64, as in ``torch.optim.swa_utils.AveragedModel``.

    Raises:
        InvalidArgumentError: (a ValueError) if ``decay`` is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = flatmin.EMA(model, decay=0.9)
        >>> handle = ema.attach(optimizer)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> logits = ema(torch.ones(2, 4))
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999, statistics: str = "averaged") -> None:
        self.decay = check_number("decay", decay, above=0, below=1)
        super().__init__(model, statistics=statistics)
        warn_if_too_coarse(self.module, self.decay)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the network. Call it after each ``optimizer.step()``, or `attach` once.

        Raises:
            InvalidArgumentError: If the network was sharded and the average was not.
        """
        self._loads.check(self.model, self.module, self)
        warn_if_updated_twice(self)
        move(self.module, self.model, self.decay, statistics=self.statistics != "fresh")
        self.n_averaged += 1

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Makes ``optimizer``, a plain one or flatmin's, call `update` after each step, and save and load the average.

        Attach before a checkpoint is loaded: the average then goes on from there.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return attach(self, optimizer, network=self.model, after_step=type(self).update)

    def extra_repr(self) -> str:
        """Shows the decay when printed."""
        return f"decay={self.decay}"
