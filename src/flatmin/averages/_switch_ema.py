"""Switch EMA: training goes on from its own moving average after each epoch.

*Switch EMA: A Free Lunch for Better Flatness and Sharpness*, Li et al. 2024, arXiv 2402.09240::

    average_t = decay * average_(t-1) + (1 - decay) * model_t
    model = average                                             at each epoch's end
"""

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number
from ._average import move, overwrite
from ._base import WeightAverage


class SwitchEMA(WeightAverage):
    """Keeps the moving average and, after each epoch, puts it in the network's place: no pass, one copy.

    The optimizer's state (momenta) stays as it is. After an epoch network and average are the same, so that either may
    be evaluated.

    Args:
        model: The network that is trained. It is copied.
        decay: Of the average, in (0, 1); .999 in most of the authors' recipes. Where the horizon is long beside an
            epoch, the switch takes back most of what the epoch has learnt: choose it by `ema_decay`.
        start_epoch: Epochs, from the first, after which nothing is switched; the authors' recipes for classification
            and regression from scratch have 5 of several hundred.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> sema = flatmin.SwitchEMA(model, decay=0.9)
        >>> handle = sema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> sema.epoch_done()
        >>> bool((model.weight == sema.average.module.weight).all())
        True
    """

    epochs: Tensor

    def __init__(self, model: nn.Module, *, decay: float = 0.999, start_epoch: int = 0) -> None:
        self.decay = check_number("decay", decay, above=0, below=1)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        super().__init__(model, decay=self.decay)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def step_done(self) -> None:
        """Moves the average towards the network."""
        move(self.average.module, self.model, self.decay)

    @torch.no_grad()
    def epoch_done(self) -> None:
        """Puts the average in the network's place, once ``start_epoch`` epochs have gone by."""
        self.epochs += 1
        if int(self.epochs) > self.start_epoch:
            overwrite(self.model, self.average.module)
