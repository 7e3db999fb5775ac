"""Switch EMA: training goes on from its own moving average after each epoch.

*Switch EMA: A Free Lunch for Better Flatness and Sharpness*, Li et al. 2024, arXiv 2402.09240::

    average_t = decay * average_(t-1) + (1 - decay) * model_t       after each step
    model = average                                                 after each epoch
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._attached import Attachment, attach
from .._checks import check_integer, check_number
from ._average import move, put_into, warn_if_too_coarse
from ._base import WeightAverage, warn_if_updated_twice


class SwitchEMA(WeightAverage):
    """Keeps the moving average of the weights and puts it into the network after each epoch. No pass, one copy.

    ``average_t = decay * average_(t-1) + (1 - decay) * model_t``, and ``model = average`` after each epoch.

    Call `update` after each ``optimizer.step()``, or `attach` once, and `switch` after each epoch, before the
    evaluation. Network and average are then equal, so evaluate either; `refresh`, before or after `switch`, gives both
    the same fresh statistics. They decide the evaluation and not the training, in which batch norm does not use them.
    The optimizer's momenta stay as they are.

    Args:
        model: The network that is trained, already on its device, wrapped or not. It is copied.
        decay: Decay of the average, in (0, 1); 0.999 in most of the authors' recipes. Make it with `ema_decay` from a
            horizon of about one epoch. With a much longer horizon each switch takes back most of what the epoch learnt.
        start_epoch: Switch only after more than so many epochs. The authors' recipes for classification and
            regression from scratch have 5, of several hundred.
        statistics: Which batch-norm statistics the average has, see `WeightAverage`.

    Attributes:
        module: The averaged network itself.
        n_averaged: 1 plus the number of updates, int64.
        epochs: Number of calls of `switch`, int64.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or ``model`` cannot be copied.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> average = flatmin.SwitchEMA(model, decay=0.9)
        >>> handle = average.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> average.switch()
        >>> bool((model.weight == average.module.weight).all())
        True
    """

    epochs: Tensor

    def __init__(
        self, model: nn.Module, *, decay: float = 0.999, start_epoch: int = 0, statistics: str = "averaged"
    ) -> None:
        self.decay = check_number("decay", decay, above=0, below=1)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        super().__init__(model, statistics=statistics)
        warn_if_too_coarse(self.module, self.decay)
        self._switched = False
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64, device="cpu"))

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
        self._switched = False

    @torch.no_grad()
    def switch(self) -> None:
        """Puts the average into the network, once ``start_epoch`` epochs have gone by. Call it after each epoch."""
        self.epochs += 1
        if int(self.epochs) > self.start_epoch:
            put_into(self.model, self.module)
            self._switched = True

    def refresh(self, batches: Iterable[Any]) -> None:
        """Makes the average's statistics anew, see `WeightAverage.refresh`.

        Between `switch` and the next `update` the network is equal to the average, and gets the same statistics.
        """
        super().refresh(batches)
        if self._switched:
            put_into(self.model, self.module)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Makes ``optimizer``, a plain one or flatmin's, call `update` after each step, and save and load the average.

        `switch` stays yours to call. Attach before a checkpoint is loaded.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return attach(self, optimizer, network=self.model, after_step=type(self).update)

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return f"decay={self.decay}, start_epoch={self.start_epoch}"
