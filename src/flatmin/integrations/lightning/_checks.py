"""What a Trainer may do that the callbacks cannot be right with; each is refused in a sentence."""

import inspect
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from ...errors import InvalidArgumentError
from ...losses import SAF
from ...optim import SharpnessAware as Optimizer


def kind_of(value: object) -> str:
    """The name of its class."""
    return type(value).__name__


def check_package_of(callback: L.Callback, trainer: Any) -> None:
    """Refuses a Trainer of another package."""
    if not isinstance(trainer, L.Trainer):
        raise InvalidArgumentError(
            f"{kind_of(callback)} is for lightning.Trainer, got {type(trainer).__module__}'s: import lightning as L"
        )


def check_without_saf(optimizer: Optimizer, losses: Iterable[Any]) -> None:
    """Refuses SAF among ``losses``, if the optimizer makes two passes."""
    if optimizer.max_passes > 1 and any(isinstance(each, SAF) for each in losses):
        name = kind_of(optimizer)
        raise InvalidArgumentError(
            f"SAF is to save the second pass that {name} makes, and has no past in it: use SAF or {name}, not both"
        )


def check_trainer(callback: L.Callback, trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuses what passes cannot be made with.

    Raises:
        InvalidArgumentError: With the way out.
    """
    name, kind = kind_of(callback), kind_of(module)
    if sum(isinstance(each, type(callback)) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise InvalidArgumentError(f"the Trainer has two callbacks {name}: keep one of them")
    if not module.automatic_optimization:
        raise InvalidArgumentError(
            f"{name} makes the passes itself, and {kind} does so too (automatic_optimization=False): leave the "
            "callback out, return flatmin.SAM(base) from configure_optimizers, and call optimizer.step(closure), where "
            "the closure calls zero_grad() and manual_backward(loss) and returns the loss"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InvalidArgumentError(
            f"{name} is for one device and for strategy='ddp', got {kind_of(trainer.strategy)}, in which a gradient is "
            "not all of it where it is looked at"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise InvalidArgumentError(
            f"{kind}.training_step takes dataloader_iter, so that its batch cannot be given to it again for the second "
            "pass: let it take batch"
        )
