"""What a Trainer may do that the mixin cannot be right with; each is refused in a sentence."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from ..._distributed import unwrapped
from ...errors import InvalidArgumentError
from ...losses import MESA, SAF, OnlineLabelSmoothing, logit_squeezing
from ...optim import SharpnessAware

WRITE = "sharpness=partial(flatmin.SAM, rho=0.05)"
_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)


def kind_of(value: object) -> str:
    """The name of its class."""
    return type(value).__name__


def check_order(kind: type, mixin: type) -> None:
    """Refuses a class in which the Trainer comes before the mixin."""
    order = kind.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise InvalidArgumentError(
            f"{kind.__name__} has the Trainer before the mixin, which then does nothing: class {kind.__name__}"
            "(Sharpness, Trainer)"
        )


def check_sharpness(sharpness: Any) -> None:
    """Refuses what is no function of the plain optimizer, and methods that need more than a Trainer gives."""
    if sharpness is None:
        return
    if isinstance(sharpness, SharpnessAware):
        raise InvalidArgumentError(
            f"sharpness takes a function of the plain optimizer, got an optimizer: sharpness=flatmin."
            f"{kind_of(sharpness)}, or leave it out and give optimizers=(optimizer, None)"
        )
    inner = sharpness.func if isinstance(sharpness, partial) else sharpness
    if not callable(inner) or (isinstance(inner, type) and not issubclass(inner, SharpnessAware)):
        raise InvalidArgumentError(f"sharpness must be one of flatmin's optimizers, {WRITE}, got {sharpness!r}")
    if isinstance(inner, type):
        check_method(inner)
    if isinstance(sharpness, partial) and "scaler" in sharpness.keywords:
        raise InvalidArgumentError("sharpness has no scaler: the Trainer makes one, with fp16=True")


def check_method(method: type[SharpnessAware]) -> None:
    """Refuses a method that needs the loss of each sample."""
    if method.per_sample_closure:
        raise InvalidArgumentError(
            f"{method.__name__} needs the loss of each sample, which compute_loss does not return: use flatmin.SAM, or "
            "to pay less flatmin.LookSAM or when=flatmin.optim.Every(2)"
        )


def check_penalty(penalty: Any) -> None:
    """Refuses what is no penalty, and makes none."""
    if penalty is None or isinstance(penalty, (SAF, MESA)):
        return
    inner = penalty.func if isinstance(penalty, partial) else penalty
    if inner is SAF:
        raise InvalidArgumentError("penalty takes SAF made: penalty=flatmin.SAF(len(train_dataset), num_labels)")
    if inner is logit_squeezing or inner is OnlineLabelSmoothing or isinstance(inner, OnlineLabelSmoothing):
        raise InvalidArgumentError(
            "penalty is for SAF and MESA, and this loss needs nothing of the mixin: leave penalty out, and give the "
            "Trainer a compute_loss_func that adds the loss, as docs/plug-in/transformers.md does with "
            "flatmin.logit_squeezing"
        )
    wrong = isinstance(inner, nn.Module) or (isinstance(inner, type) and not issubclass(inner, MESA))
    if wrong or not callable(inner):
        raise InvalidArgumentError(
            "penalty must be flatmin.SAF(len(train_dataset), num_labels), flatmin.MESA(model), or a function that "
            f"makes MESA of the model, such as partial(flatmin.MESA, decay=0.999), got {penalty!r:.80}"
        )


def check_trainer(trainer: Any) -> None:
    """Refuses settings under which the passes cannot be made, and two optimizers of flatmin's at once.

    Raises:
        InvalidArgumentError: With the way out.
    """
    given = inside(trainer.optimizer)
    kind = trainer.optimizer_cls_and_kwargs[0] if trainer.optimizer_cls_and_kwargs is not None else None
    if isinstance(kind, type) and issubclass(kind, SharpnessAware):
        raise InvalidArgumentError(
            f"optimizer_cls_and_kwargs is for the plain optimizer, got {kind.__name__}, which wraps one: give "
            f"sharpness=partial(flatmin.{kind.__name__}, ...) to the mixin flatmin.integrations.transformers.Sharpness"
        )
    if isinstance(given, SharpnessAware):
        if trainer.sharpness is not None:
            raise InvalidArgumentError(
                f"optimizers has flatmin's {kind_of(given)}, and sharpness another: give the plain optimizer in "
                "optimizers, or leave sharpness out"
            )
        check_method(type(given))
    used = (trainer.sharpness, trainer.penalty, trainer._make_penalty)
    if all(each is None for each in used) and not isinstance(given, SharpnessAware):
        return
    if trainer.accelerator.distributed_type in _SHARDED or trainer.is_distributed_loading_by_transformers:
        raise InvalidArgumentError(
            "Sharpness is for one device and for DistributedDataParallel, got "
            f"{trainer.accelerator.distributed_type.value}, in which a gradient is not all of it where it is looked at"
        )
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise InvalidArgumentError("Sharpness is for one device and DistributedDataParallel, got a parallelism_config")
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if given is None and kind is None and ("lomo" in name or "layerwise" in name):
        raise InvalidArgumentError(
            f"optim={name!r} steps within backward(), before there is a gradient to perturb along: take another, such "
            "as optim='adamw_torch'"
        )


def check_together(penalty: Any, optimizer: Any) -> None:
    """Refuses SAF beside an optimizer of two passes."""
    if isinstance(penalty, SAF) and isinstance(optimizer, SharpnessAware) and optimizer.max_passes > 1:
        name = kind_of(optimizer)
        raise InvalidArgumentError(
            f"SAF is to save the second pass that {name} makes, and has no past in it: use penalty=flatmin.SAF(...) or "
            f"{name}, not both"
        )


def check_network(mesa: MESA, model: nn.Module) -> None:
    """Refuses an average of another network than the one that is trained."""
    if unwrapped(mesa._networks[1]) is not unwrapped(model):
        raise InvalidArgumentError(
            "penalty is MESA of another network than the Trainer trains: make it of the Trainer's model, "
            "flatmin.MESA(model), or let it be made, penalty=flatmin.MESA"
        )


def inside(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def made_of(make: Callable[..., Any], plain: Any, **keywords: Any) -> SharpnessAware:
    """Flatmin's optimizer around the plain one.

    Raises:
        InvalidArgumentError: If ``make`` makes something else.
    """
    made = make(plain, **keywords)
    if not isinstance(made, SharpnessAware):
        raise InvalidArgumentError(
            f"sharpness must make an optimizer of flatmin's of the plain one, {WRITE}, got {kind_of(made)}"
        )
    check_method(type(made))
    return made
