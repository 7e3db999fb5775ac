"""SAF and MESA in a Trainer: how what a model takes and returns is given to them, and how their mean is weighted."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..._attached import attach
from ..._distributed import broadcast_buffers, unwrapped
from ...errors import InvalidArgumentError
from ...losses import MESA, SAF
from ...losses._comparison import IGNORED
from ...losses._outputs import find_logits
from ...losses._trajectory import resolve_class_dim

_NO_INPUTS = ("labels", "shift_labels", "return_loss", "num_items_in_batch")


def penalty_of(trainer: Any, inputs: Mapping[str, Any], outputs: Any, index: Tensor | None) -> Tensor:
    """The penalty of a micro-batch, a mean over what counts in it.

    Args:
        trainer: The Trainer, with its penalty.
        inputs: What the model was called with, labels too.
        outputs: What it returned; the loss first, if it is a tuple.
        index: The samples', for SAF.
    """
    penalty = trainer.penalty
    smoothed = trainer.label_smoother is not None and "labels" in inputs
    if isinstance(outputs, tuple) and trainer.compute_loss_func is None and not smoothed:
        outputs = outputs[1:]
    if isinstance(penalty, SAF):
        logits = outputs[0] if isinstance(outputs, tuple) and outputs else find_logits(outputs, None)
        if not isinstance(logits, Tensor):
            raise InvalidArgumentError(
                f"{type(trainer.model).__name__} returns no logits for SAF to compare, but "
                f"{', '.join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__}: use "
                "flatmin.MESA(model, output=...), which takes what you name"
            )
        return trainer.penalty(logits, index)  # type: ignore[no-any-return]
    left_out = {*_NO_INPUTS, *trainer.label_names}
    if getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False):
        left_out -= {"labels"}  # of which the decoder's inputs are made
    called = {name: value for name, value in inputs.items() if name not in left_out}
    with trainer.accelerator.autocast():  # which is within the model's own forward, and not the average's
        return penalty(outputs, where=_where(trainer, inputs, outputs), **called)  # type: ignore[no-any-return]


def share_of(trainer: Any, inputs: Mapping[str, Any], num_items: Any) -> Any:
    """What a micro-batch's mean is multiplied with, so that it is weighted as the Trainer weights the model's loss."""
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None
    if not scaled:
        return 1.0  # the Trainer divides the sum of both
    counted = _counted_labels(trainer, inputs)
    if num_items is None or counted is None or trainer.args.n_gpu > 1:
        return 1 / trainer.current_gradient_accumulation_steps
    ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return counted.ne(IGNORED).sum() * ranks / num_items


def follow(mesa: MESA, optimizer: Any, *, replicated: bool) -> None:
    """Updates the average after each step, and saves and loads it with the optimizer."""
    network = unwrapped(mesa._networks[1])

    def update(module: MESA) -> None:
        if replicated:
            broadcast_buffers([network])  # as DDP is about to do, so that averages are the same too
        module.update()

    attach(mesa, optimizer, after_step=update)


def _counted_labels(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """The labels that the Trainer counts; of a causal language model those of the next tokens."""
    labels = inputs.get("labels")
    if isinstance(shifted := inputs.get("shift_labels"), Tensor):
        return shifted
    if not isinstance(labels, Tensor):
        return None
    return labels[..., 1:] if _shifts(trainer) else labels


def _shifts(trainer: Any) -> bool:
    """Whether the model's loss compares each position with the next token; the Trainer does not know it of GPT-2."""
    network = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return trainer._loss_shifts_labels or any(kind.__name__ in names for kind in type(network).__mro__)


def _where(trainer: Any, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:
    """Which positions have a label; None: all, or MESA is told otherwise."""
    compare = trainer.penalty._comparison
    labels, logits = _counted_labels(trainer, inputs), compare.outputs(outputs)
    alone = callable(compare.distance) or compare.link != "softmax" or not isinstance(logits, Tensor)
    if alone or labels is None or labels.is_floating_point():
        return None
    where = labels.ne(IGNORED)
    if "shift_labels" not in inputs and _shifts(trainer):  # nothing follows the last token
        where = torch.cat([where, torch.zeros_like(where[..., :1])], dim=-1)
    shape = list(logits.shape)
    del shape[resolve_class_dim(logits, compare.class_dim)]
    return where if list(where.shape) == shape else None
