"""What a criterion takes its mean over: samples, or what their targets count."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Count = Callable[[Any], float]
_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FUNCTIONS = (F.cross_entropy, F.nll_loss)


def counting(loss_fn: Any) -> Count | None:
    """How much a batch counts in the mean over all, as a function of its targets; None where samples count alike.

    The cross entropy and the negative log likelihood of torch divide by the targets that are not ``ignore_index``, each
    times its class's ``weight``. Any other function cannot be asked.

    Args:
        loss_fn: One of these, as a module, a function, or a `functools.partial` of one with keywords.
    """
    options: dict[str, Any] = {}
    while isinstance(loss_fn, functools.partial) and not loss_fn.args:
        options = {**loss_fn.keywords, **options}
        loss_fn = loss_fn.func
    if isinstance(loss_fn, _MODULES) and type(loss_fn).forward in [each.forward for each in _MODULES]:
        options = {"weight": loss_fn.weight, "ignore_index": loss_fn.ignore_index, **options}
    elif loss_fn not in _FUNCTIONS:
        return None
    return functools.partial(_count, weight=options.get("weight"), ignored=options.get("ignore_index", -100))


def _count(y: Any, weight: Tensor | None, ignored: int) -> float:
    if not isinstance(y, Tensor) or y.is_floating_point():  # probabilities, of which each sample's count alike
        return len(y)
    kept = y[y != ignored]
    return kept.numel() if weight is None else float(weight.detach().to(y.device, torch.float64)[kept].sum())
