"""MESA in timm's tasks, against the average that timm keeps anyway."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..._checks import check_integer
from ..._distributed import broadcast_state
from ..._warn import depth_in_package
from ...errors import FlatminWarning, InvalidArgumentError
from ...losses import MESA
from . import _package

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "mesa"  # of its state in the task's
_FORGOTTEN = 1000  # training passes without an update of the average, from which on it cannot be accumulation


class MESATask:
    """A task of timm whose loss has MESA's beside it, with timm's own average as the teacher.

    ``MESATask(model, criterion)`` takes the place of ``ClassificationTask(model, criterion)`` in timm's ``train.py``.
    As a mixin it does the same to another task: ``class MyTask(MESATask, LogitDistillationTask): ...``. Not to
    ``TokenDistillationTask``, whose network returns the mean of its two heads in evaluation, where the average runs.

    There is one averaged copy of the network, the one that ``setup_ema`` makes (``--model-ema``), moves
    (``update_ema``), saves and evaluates. timm tells a task of no epochs, so that the loss begins after a number of
    updates: ``start_epoch * updates_per_epoch``, where an update is a step of the optimizer.

    Args:
        *args: The task's: model and criterion.
        start_update: First update, from 0, after which the loss is not 0.
        coefficient: As in `flatmin.MESA`; so are all below.
        temperature: ``T`` > 0.
        fraction: Share of each batch on which the average runs.
        interval: Compute the loss in every ``interval``-th pass.
        autocast: Precision of the average.
        output: Takes the logits from what the model returns.
        class_dim: Which dimension of the logits is the classes'.
        link: "softmax" or "sigmoid".
        **kwargs: The task's.

    Attributes:
        mesa: The `flatmin.MESA`; None before ``setup_ema``.

    Raises:
        MissingDependencyError: If there is no timm.
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or of no use for the task; in the
            first training pass without ``setup_ema``.

    Example:
        >>> from flatmin.integrations.timm import MESATask, preset
        >>> def make_task(model, criterion, updates_per_epoch):
        ...     found = preset("mila_tiny")
        ...     task = MESATask(model, criterion, **found.task(updates_per_epoch))
        ...     task.setup_ema(decay=found.decay_at(updates_per_epoch))
        ...     return task
    """

    # Of the task's.
    trainable_module: Any
    trainable_module_ema: Any
    get_trainable_module: Any
    get_eval_model: Any

    mesa: MESA | None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Self":
        made: Self = object.__new__(_classification() if cls is MESATask else cls)
        return made

    def __init__(
        self,
        *args: Any,
        start_update: int = 0,
        coefficient: float = 0.8,
        temperature: float = 5.0,
        fraction: float = 1.0,
        interval: int = 1,
        autocast: torch.dtype | None = None,
        output: Callable[[Any], Any] | None = None,
        class_dim: int | None = None,
        link: Literal["softmax", "sigmoid"] = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_task(link)
        self._options: dict[str, Any] = {
            "start_epoch": check_integer("start_update", start_update, least=0),  # MESA's epochs are updates here
            "coefficient": coefficient,
            "temperature": temperature,
            "fraction": fraction,
            "interval": interval,
            "autocast": autocast,
            "output": output,
            "class_dim": class_dim,
            "link": link,
        }
        MESA(nn.Linear(1, 1), average=nn.Linear(1, 1), **self._options)  # checks them
        self.mesa = None
        self._loaded: dict[str, Any] | None = None  # what is to be loaded when there is a MESA
        self._passes = 0  # in training, since the last update

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Makes timm's average, and MESA of it.

        Raises:
            InvalidArgumentError: If the average is on another device than the network.
        """
        average: nn.Module = super().setup_ema(*args, **kwargs)  # type: ignore[misc]
        network = self.get_trainable_module()
        here, there = (next(each.parameters()).device for each in (network, average))
        if here != there:
            raise InvalidArgumentError(
                f"the network is on {here} and its average on {there}, where MESA cannot run it in each step: leave "
                "out device= of setup_ema, and --model-ema-force-cpu"
            )
        # Of a task whose trainable module has more than the network in it, the network.
        self.mesa = MESA(self.get_eval_model(), average=self.get_eval_model(ema=True), **self._options)
        if self._loaded is not None:
            self.mesa.load_state_dict(self._loaded)
            self._loaded = None
        return average

    def prepare_distributed(self, *args: Any, **kwargs: Any) -> Any:
        """Wraps the network as timm does; all ranks get the first one's average, as they do its network."""
        super().prepare_distributed(*args, **kwargs)  # type: ignore[misc]
        average = self.get_trainable_module(ema=True)
        if average is not None:
            broadcast_state(average)
        return self

    def update_ema(self, step: int | None = None) -> None:
        """Moves timm's average, and counts the update; ``step`` is the number of updates so far."""
        super().update_ema(step=step)  # type: ignore[misc]
        self._passes = 0
        if self.mesa is not None:
            self.mesa.set_epoch(self.mesa._epoch + 1 if step is None else int(step))

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:  # timm's name
        """Computes the task's loss, and in training adds MESA's; ``mesa_loss`` is that alone.

        Raises:
            InvalidArgumentError: If there is no average.
        """
        result: dict[str, Tensor] = super().forward(input, target)  # type: ignore[misc]
        if not self.trainable_module.training or not torch.is_grad_enabled():
            return result
        if self.mesa is None:
            raise InvalidArgumentError(
                "MESATask has no average to compare with: call task.setup_ema(decay=...) before the training; in "
                "timm's train.py, --model-ema"
            )
        self._watch()
        penalty = self.mesa(result["output"], input)
        return {**result, "loss": result["loss"] + penalty, "mesa_loss": penalty.detach()}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What is not in the network's state or the average's: how many updates there were, and MESA's draws."""
        state: dict[str, Any] = super().get_task_state(module=module, ema=ema)  # type: ignore[misc]
        return state if ema or self.mesa is None else {**state, KEY: self.mesa.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Loads it; before ``setup_ema``, as timm's ``train.py`` does, it is kept until then."""
        state = dict(state or {})
        found = None if ema else state.pop(KEY, None)
        super().load_task_state(state, strict=strict, module=module, ema=ema)  # type: ignore[misc]
        if found is None:
            return
        if self.mesa is None:
            self._loaded = found
        else:
            self.mesa.load_state_dict(found)

    def _check_task(self, link: str) -> None:
        """Refuses a task whose logits are not what the average's would be compared with."""
        if isinstance(self, _package.timm("task").TokenDistillationTask):
            raise InvalidArgumentError(
                "MESATask cannot be a TokenDistillationTask: the network returns its two heads apart in training, and "
                "their mean in evaluation, where MESA runs its average; take LogitDistillationTask"
            )
        if getattr(self, "multi_label", False) and link == "softmax":
            raise InvalidArgumentError(
                f"{type(self).__name__} has several labels a sample, of which link='softmax' makes one: write "
                "link='sigmoid'"
            )

    def _watch(self) -> None:
        """Warns where the loop does not move the average, so that the teacher is the network as it was made."""
        self._passes += 1
        if self._passes == _FORGOTTEN:
            warnings.warn(
                f"MESATask has made {self._passes} training passes since its average was moved: call "
                "task.update_ema(step) after each step of the optimizer",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )


@cache
def _classification() -> type:
    """`MESATask` of timm's ``ClassificationTask``."""
    return type("MESATask", (MESATask, _package.timm("task").ClassificationTask), {"__doc__": MESATask.__doc__})
