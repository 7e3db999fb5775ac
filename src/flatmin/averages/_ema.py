"""The exponential moving average of a network's weights, evaluated in its place.

::

    average_t = decay * average_(t-1) + (1 - decay) * model_t
"""

import torch
from torch import nn

from .._checks import check_number
from ._average import move
from ._base import WeightAverage


class EMA(WeightAverage):
    """Keeps the moving average and lets training be: no pass, one copy of the network.

    The control for MESA, whose target it is: what is gained by evaluating the average alone.

    Args:
        model: The network that is trained. It is copied.
        decay: Of the average, in (0, 1); `ema_decay` makes it from a horizon in epochs.

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

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        self.decay = check_number("decay", decay, above=0, below=1)
        super().__init__(model, decay=self.decay)

    @torch.no_grad()
    def step_done(self) -> None:
        """Moves the average towards the network."""
        move(self.average.module, self.model, self.decay)

    def epoch_done(self) -> None:
        """Does nothing."""
