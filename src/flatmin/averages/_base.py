"""What averages of a network's weights share."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._attached import Attachment, is_lost_copy, is_updated_twice
from .._checks import Loaded, check_choice, shown
from .._distributed import unwrapped
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError, StateDictError
from ._average import evaluating
from ._copy import copied
from ._loads import Loads
from ._statistics import CHOICES, moving_layers, own_statistics, refresh


class WeightAverage(Loaded, ABC):
    """An average of a network's weights along its training, to evaluate in place of the network.

    `update` takes the network's current weights into the average; each subclass says when to call it. Calling the
    average runs the averaged network, in evaluation mode and without gradient. ``state_dict`` has all that a resumed
    run needs.

    **Batch norm**: call `refresh` before you evaluate or deploy the average of a network with batch norm. The mean of
    the statistics of many networks belongs to none of them, and can cost the average points of accuracy while the
    learning rate is high.

    Tensors are paired by name. Other floating buffers are averaged where that gives a finite number, and copied where
    it does not (a mask of -inf); integers, masks of pruning and buffers of parametrizations are copied; a buffer that
    the network makes, resizes or drops later is followed. The vectors of spectral norm follow the average's weights.

    The average has those of the network's forward hooks that belong to it: torch's own (``torch.nn.utils``), and
    methods of objects within it. Others, such as functions that keep features, are left out with a warning. Layers with
    a ``train()`` of their own, such as LoRA that folds its weights for evaluation, are averaged in the network's form.

    Args:
        model: The network that is trained, already on its device, wrapped (DistributedDataParallel, torch.compile) or
            not. It is copied.
        statistics: The running means and variances of batch norm (and of instance norm that tracks them).
            ``"averaged"``: averaged with the weights, from the last `refresh` on. ``"fresh"``: made by `refresh` alone;
            `update` leaves them. ``"batch"``: calling the average normalises each batch with its own, whatever
            ``module`` has. Without such layers all are the same.

    Attributes:
        module: The averaged network itself, without wrappers, in evaluation mode.
        n_averaged: How many networks it has seen: the one it was made from, and one for each `update`; int64.

    Raises:
        InvalidArgumentError: (a ValueError) if ``model`` cannot be copied, or ``statistics`` is none of the three.
    """

    module: nn.Module
    n_averaged: Tensor
    _beside_network: ClassVar[bool] = True  # see _layers

    def __init__(self, model: nn.Module, *, statistics: str = "averaged") -> None:
        super().__init__()
        self.statistics = check_choice("statistics", statistics, CHOICES)
        self._refreshed = False
        self._warned = False
        self.module = copied(model)
        self.register_buffer("n_averaged", torch.ones((), dtype=torch.int64, device="cpu"))
        self._model = (model,)  # in a tuple, so that it is no submodule and not saved twice
        self._loads = Loads(model)

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""
        return self._model[0]

    @abstractmethod
    def update(self) -> None:
        """Takes the network's current weights into the average."""

    @abstractmethod
    def attach(self, optimizer: Optimizer) -> Attachment:
        """Saves and loads the average with the optimizer; ``remove()`` of the handle detaches.

        Attach before you load a checkpoint. Make a copy of all by ``copy.deepcopy((model, optimizer, average))``.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged network, in evaluation mode and without gradient."""
        self._warn_if_never_refreshed()
        warn_if_left_behind(self, self)
        own = own_statistics(self.module, self.model) if self.statistics == "batch" else nullcontext()
        with evaluating(self.module), own:
            return self.module(*args, **kwargs)

    def refresh(self, batches: Iterable[Any]) -> None:
        """Makes the average's batch-norm statistics anew, from training data. Call it before each evaluation.

        They become the mean over ``batches``, as ``torch.optim.swa_utils.update_bn`` computes it, with dropout off. A
        share of the training set is enough; take batches as large as in training, or larger. With
        DistributedDataParallel call it on all ranks, each with batches of its own: all get the mean over all ranks.
        Without layers that keep statistics nothing is done, and ``batches`` is not read. Layers that the network keeps
        in evaluation mode while it trains (frozen batch norm) keep what they have.

        Args:
            batches: The network's inputs, a `DataLoader` for one: tensors, or tuples or lists that begin with one, or
                dictionaries of keyword arguments. An index beside them, as of `flatmin.with_indices` or
                `flatmin.indexed`, is left out. They are moved to the average's device.

        Raises:
            InvalidArgumentError: If there is no batch. After any error the statistics are as before.
        """
        if not isinstance(batches, Iterable):
            raise InvalidArgumentError(
                f"batches must be inputs of the network, such as a DataLoader, got {shown(batches)}"
            )
        with evaluating(self.module):
            refresh(self.module, self.model, batches)
        self._refreshed = True

    def train(self, mode: bool = True) -> "WeightAverage":
        """Sets the mode of this module; the averaged network stays in evaluation mode."""
        self.training = mode
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}average.n_averaged" in state_dict:
            raise StateDictError(
                "the state's average was saved by an earlier version of flatmin, whose layout was another; nothing was "
                "loaded, begin with a new average or go on with that version"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._refreshed = True  # as far as can be known
        self._settle_loads()

    def _settle_loads(self) -> None:
        """What the average is to go on from is known; called by `flatmin._attached` too, which has said it."""
        self._loads.settle()

    def _warn_if_never_refreshed(self) -> None:
        """Warns once where the statistics are still those of the network that the average was made from."""
        if self.statistics != "fresh" or self._refreshed or int(self.n_averaged) == 1:
            return
        self._refreshed = True
        if moving_layers(self.module, self.model):
            warnings.warn(
                f'{type(self).__name__}(statistics="fresh") has never been given statistics, so its batch norm still '
                "has those of the network it was made from: call refresh(batches) before it is run",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )


def warn_if_updated_twice(attached: nn.Module) -> None:
    """Warns once where somebody updates an average by hand that an optimizer updates, so that it moves twice a step.

    Args:
        attached: The average, or the MESA that has it.
    """
    if is_updated_twice(attached) and not vars(attached).get("_twice", False):
        vars(attached)["_twice"] = True
        warnings.warn(
            f"update() was called of a {type(attached).__name__} that is attached to an optimizer, which calls it "
            "after each step, so that it moves twice: leave out update(), or attach (warned once)",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )


def warn_if_left_behind(average: WeightAverage, attached: nn.Module) -> None:
    """Warns once where a copy of an attached average is run after its network has gone on without it.

    Args:
        average: The average.
        attached: What was attached: the average, or the MESA that has it.
    """
    if average._warned or not is_lost_copy(attached):
        return
    updated = average.n_averaged._version > copy.deepcopy(torch.zeros(()))._version
    if not updated and any(parameter._version for parameter in unwrapped(average.model).parameters()):
        average._warned = True
        warnings.warn(
            f"this {type(attached).__name__} is a copy of one that was attached to an optimizer, is attached to none, "
            "and has not followed its network: attach it, or copy all together, the optimizer first: "
            "copy.deepcopy((model, optimizer, average))",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )
