"""MESA, the memory-efficient form of SAF: the trajectory loss against an averaged copy of the network.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083, equations 9 and 12.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from .._checks import check_integer, check_number
from ..errors import FlatminWarning, InvalidArgumentError
from ._trajectory import trajectory_loss


def ema_decay(epochs: float, steps_per_epoch: int) -> float:
    """Decay of an exponential moving average whose horizon is a number of epochs.

    ``decay = 1 - 1 / (epochs * steps_per_epoch)``. A fixed decay means another horizon on every data set: .9998
    remembers 5,000 steps, which is 16 epochs of ImageNet at batch 4096 and a whole run elsewhere.

    Args:
        epochs: Horizon in epochs, > 0.
        steps_per_epoch: Optimizer steps in an epoch, such as ``len(loader)``.

    Raises:
        InvalidArgumentError: If the horizon is not longer than one step.

    Example:
        >>> import flatmin
        >>> flatmin.ema_decay(epochs=10, steps_per_epoch=50)
        0.998
    """
    horizon = check_number("epochs", epochs, above=0) * check_integer("steps_per_epoch", steps_per_epoch, least=1)
    if horizon <= 1:
        raise InvalidArgumentError(
            f"epochs * steps_per_epoch must be more than one step, got {epochs!r} * {steps_per_epoch}"
        )
    return 1 - 1 / horizon


class MESA(nn.Module):
    """Penalises how far the network's output has moved from that of its own moving average.

    ``coefficient * T**2 / B * sum_i KL(softmax(average(x)_i / T) || softmax(logits_i / T))``

    with ``average_t = decay * average_(t-1) + (1 - decay) * model_t``, started at the model's weights. The average is
    ``torch.optim.swa_utils.AveragedModel``: floating buffers (batch-norm statistics) are averaged with the weights,
    integer ones are copied. It runs in evaluation mode and without gradient, and not at all before ``start_epoch``.

    It costs a forward pass, about one third of a step, and one copy of the network.

    Args:
        model: The network that is trained, already on its device. It is copied.
        coefficient: Weight of the loss, lambda in the paper; at least 0.
        temperature: ``T`` > 0.
        decay: Of the average, in (0, 1). `ema_decay` makes it from a horizon in epochs.
        start_epoch: First epoch, from 0, in which the loss is not 0.

    Attributes:
        average: The averaged model, an ``AveragedModel`` in evaluation mode, ready for use; ``average.module`` is the
            network itself.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mesa = flatmin.MESA(model, decay=0.9, start_epoch=0)
        >>> handle = mesa.attach(optimizer)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     logits = model(x)
        ...     penalty = mesa(logits, x)
        ...     (torch.nn.functional.cross_entropy(logits, y) + penalty).backward()
        ...     optimizer.step()
        >>> bool(penalty > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        coefficient: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9998,
        start_epoch: int = 5,
    ) -> None:
        super().__init__()
        self.coefficient = check_number("coefficient", coefficient, least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.decay = check_number("decay", decay, above=0, below=1)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        model = _unwrapped(model)
        self.average = AveragedModel(model, use_buffers=True)
        self.average.requires_grad_(False).eval()
        self.average.n_averaged.fill_(1)  # the weights it starts from
        self._model = (model,)  # in a tuple, so that it is no submodule and not saved twice
        self._epoch = 0
        self._first_epoch: int | None = None
        self._updated = False
        self._warned = False

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, from 0; call it before each.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0.
        """
        self._epoch = check_integer("epoch", epoch, least=0)

    def forward(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the loss of a batch.

        Args:
            logits: The network's outputs, floating, shape (B, C).
            *args: What the network was called with; the averaged model is called with the same.
            **kwargs: Likewise.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise.

        Raises:
            InvalidArgumentError: If the logits are not (B, C), or the averaged model returns another shape.
        """
        if logits.ndim != 2 or not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, classes), got {logits.dtype} of shape "
                f"{tuple(logits.shape)}"
            )
        if not self.training or self._epoch < self.start_epoch or self.coefficient == 0:
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        self._check_updates()
        with torch.no_grad():
            output = self.average(*args, **kwargs)
        target = getattr(output, "logits", output)  # transformers' models return an object
        if not isinstance(target, Tensor) or target.shape != logits.shape:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise InvalidArgumentError(
                f"the averaged model returned {got} where logits of shape {tuple(logits.shape)} were expected; "
                "call mesa(logits, x) with what the model was called with"
            )
        return self.coefficient * trajectory_loss(logits, target, temperature=self.temperature)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards ``model``; call it after each ``optimizer.step()``.

        Args:
            model: The network that is trained, wrapped (DistributedDataParallel, torch.compile) or not.
        """
        # AveragedModel.update_parameters would stall an accelerator by reading its counter, and round integer buffers
        # down, which corrupts index buffers (relative_position_index) for some decays, .95 and .9996 among them.
        ours = [*self.average.module.parameters(), *self.average.module.buffers()]
        model = _unwrapped(model)
        theirs = [*model.parameters(), *model.buffers()]
        pairs = [(a.detach(), b.detach().to(a.device)) for a, b in zip(ours, theirs, strict=True)]
        averaged = [pair for pair in pairs if pair[0].is_floating_point() or pair[0].is_complex()]
        if averaged:
            ema = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
            ema([a for a, _ in averaged], [b for _, b in averaged], None)
        for a, b in pairs:
            if not (a.is_floating_point() or a.is_complex()):
                a.copy_(b)
        self.average.n_averaged += 1
        self._updated = True

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Calls `update` after each step of ``optimizer`` by itself, with the model that MESA was made for.

        Args:
            optimizer: The optimizer of the training loop, a plain one or flatmin's.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return optimizer.register_step_post_hook(lambda *_: self.update(self._model[0]))

    def train(self, mode: bool = True) -> "MESA":
        """Sets the mode of the loss; the averaged model stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Carries the epoch in ``state_dict``, as a tensor, so that any format can store it."""
        return torch.tensor([self._epoch])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the epoch from a ``state_dict``."""
        (self._epoch,) = (int(number) for number in state)

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return (
            f"coefficient={self.coefficient}, temperature={self.temperature}, decay={self.decay}, "
            f"start_epoch={self.start_epoch}"
        )

    def _check_updates(self) -> None:
        """Warns once when an epoch has gone by without an update: the target is still the untrained network."""
        if self._first_epoch is None:
            self._first_epoch = self._epoch
        late = self._epoch > self._first_epoch and not self._updated
        if late and not self._warned and int(self.average.n_averaged) == 1:
            self._warned = True
            warnings.warn(
                "MESA's average has never been updated, so it is still the network it was made with: call "
                "mesa.update(model) after optimizer.step(), or mesa.attach(optimizer) once",
                FlatminWarning,
                stacklevel=5,  # _check_updates, forward, nn.Module.__call__ (two frames), the caller
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original  # torch.compile's; naming its class would import the whole compiler
        else:
            return model
