"""The callback that makes the passes of SAM and its like inside Lightning's loop."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from ..._checks import shown
from ...errors import InvalidArgumentError
from ...optim import SharpnessAware as Optimizer
from ._checks import check_package_of, check_trainer, check_without_saf, kind_of
from ._passes import OnePass, Passes, TwoPasses


class SharpnessAware(L.Callback):
    """Trains with SAM or its like in a Lightning Trainer; the LightningModule stays as it is.

    The module returns its plain optimizer, with its schedulers; the callback wraps it, and makes both passes of each
    step itself, over all micro-batches that are accumulated. What the Trainer does to a gradient happens once, to the
    gradient that the optimizer steps with: ``gradient_clip_val`` by norm or by value, the scaler of ``16-mixed``. Logs
    and torchmetrics count the first pass, at the unperturbed weights, and so does what ``training_step`` returns. A
    resumed run continues exactly. ``on_before_backward`` and ``on_after_backward`` run in both passes, since they may
    change gradients; what writes to a logger by itself does too.

    For one device and ``ddp``, with automatic optimization.

    Args:
        method: The optimizer's class, such as ``flatmin.SAM``, or a function of the plain optimizer and the keywords.
            None (default): ``configure_optimizers`` returns flatmin's optimizer itself.
        **keywords: The optimizer's arguments. ``model`` is the LightningModule, and ``scaler`` the Trainer's.
            ``parameters`` may be a function of the LightningModule, such as
            ``flatmin.optim.normalization_parameters``.

    Attributes:
        optimizer: The optimizer, flatmin's, from the beginning of a fit; None before.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used; at the beginning of a fit, if the Trainer
            does something with which the method would not be right.

    Example:
        >>> import lightning as L, flatmin
        >>> from flatmin.integrations.lightning import SharpnessAware
        >>> trainer = L.Trainer(callbacks=[SharpnessAware(flatmin.SAM, rho=0.05)], accelerator="cpu", logger=False)
    """

    def __init__(self, method: Callable[..., Optimizer] | None = None, **keywords: Any) -> None:
        if method is None:
            if keywords:
                raise InvalidArgumentError(
                    f"SharpnessAware has {', '.join(keywords)}, and no method to give it to: name one, such as "
                    "SharpnessAware(flatmin.SAM, rho=0.05)"
                )
        else:
            _check_method(method, keywords)
        self.method, self.keywords = method, keywords
        self.optimizer: Optimizer | None = None
        self._passes: Passes | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a Trainer of another package."""
        check_package_of(self, trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wraps the optimizer, before a checkpoint of it is loaded."""
        check_trainer(self, trainer, pl_module)
        given = trainer.strategy.optimizers[0]
        plain = given.optimizer if isinstance(given, LightningOptimizer) else given
        self.optimizer = self._made_of(plain, trainer, pl_module)
        check_without_saf(self.optimizer, pl_module.modules())
        trainer.strategy.optimizers = [self.optimizer]
        kind = OnePass if self.optimizer.max_passes == 1 else TwoPasses
        self._passes = kind(trainer, pl_module, self.optimizer)
        self._passes.install()

    def on_exception(self, *_: Any) -> None:
        """Gives up the step under way."""
        self._remove()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leaves the Trainer as it was."""
        self._remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_passes": None, "optimizer": None}  # of a fit, which is not copied

    def _remove(self) -> None:
        passes, self._passes = self._passes, None
        if passes is not None:
            passes.remove()

    def _made_of(self, plain: Any, trainer: L.Trainer, module: L.LightningModule) -> Optimizer:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if isinstance(plain, Optimizer):
            name = type(plain).__name__
            if self.method is not None:
                raise InvalidArgumentError(
                    f"{kind_of(module)}.configure_optimizers returns flatmin's {name} already, and SharpnessAware was "
                    "given a method: return the plain optimizer, or make it SharpnessAware() alone"
                )
            _check_class(type(plain))
            if scaler is not None:
                plain.scaler = scaler
            return plain
        if self.method is None:
            raise InvalidArgumentError(
                f"{kind_of(module)}.configure_optimizers returns {type(plain).__name__}, and SharpnessAware() alone is "
                "for one of flatmin's: name the method, such as SharpnessAware(flatmin.SAM, rho=0.05)"
            )
        keywords = {**self.keywords}
        if "when" in keywords:
            keywords["when"] = copy.deepcopy(keywords["when"])  # a schedule may have a state; each fit has its own
        accepted = inspect.signature(self.method).parameters
        if callable(keywords.get("parameters")):
            keywords["parameters"] = keywords["parameters"](module)
        one_pass = getattr(self.method, "max_passes", 2) == 1  # by hooks on model= it would move the weights too
        if "model" in accepted and not one_pass:
            keywords.setdefault("model", module)
        made = self.method(plain, **keywords)
        if not isinstance(made, Optimizer):
            raise InvalidArgumentError(
                f"method must make an optimizer of flatmin's of the plain one, got {type(made).__name__}"
            )
        _check_class(type(made))
        if scaler is not None:
            made.scaler = scaler
        return made


def _check_method(method: Callable[..., Optimizer], keywords: dict[str, Any]) -> None:
    if isinstance(method, Optimizer):
        raise InvalidArgumentError(
            f"SharpnessAware takes the class, got an optimizer: SharpnessAware(flatmin.{type(method).__name__}, ...), "
            "or return it from configure_optimizers and make it SharpnessAware() alone"
        )
    wrong = isinstance(method, torch.nn.Module) or (isinstance(method, type) and not issubclass(method, Optimizer))
    if wrong or not callable(method):
        raise InvalidArgumentError(
            f"method must be one of flatmin's optimizers, such as flatmin.SAM, got {shown(method)}; SAF and MESA are "
            "given to the callback TrajectoryLoss"
        )
    if isinstance(method, type):
        _check_class(method)
    if "scaler" in keywords:
        raise InvalidArgumentError("SharpnessAware has no scaler: the Trainer makes one, with precision='16-mixed'")
    try:
        inspect.signature(method).bind(None, **keywords)
    except TypeError as error:
        name = getattr(method, "__name__", "the method")
        raise InvalidArgumentError(
            f"SharpnessAware gives its keywords to {name}, which refuses them: {error}"
        ) from None


def _check_class(method: type[Optimizer]) -> None:
    if method.per_sample_closure:
        raise InvalidArgumentError(
            f"{method.__name__} needs the loss of each sample, which training_step does not return: use flatmin.SAM, "
            "or to pay less flatmin.LookSAM or when=flatmin.optim.Every(2)"
        )
