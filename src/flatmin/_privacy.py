"""Training with differential privacy by Opacus: what would be without privacy in it is refused.

Opacus is not imported. Its ``DPOptimizer`` is told by its attributes, and what it trains by ``grad_sample``, which each
parameter has in every mode until ``cleanup()``; those of ghost clipping have ``_norm_sample`` after the first backward
pass.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError

WAY = "flatmin.integrations.opacus.DPSAT(module=model, optimizer=optimizer)"


def is_private_optimizer(optimizer: object) -> bool:
    """Whether it is one of Opacus', which clip and add noise."""
    return hasattr(optimizer, "original_optimizer") and hasattr(optimizer, "noise_multiplier")


def check_not_private(base: Any) -> None:
    """Refuses an optimizer of Opacus' as the base of one of flatmin's, and one of parameters that Opacus trains."""
    if is_private_optimizer(base):
        raise InvalidArgumentError(
            f"base_optimizer {type(base).__name__} trains with differential privacy, and would be without privacy in a "
            f"flatmin optimizer, which perturbs along gradients that have no noise; leave it as it is, and attach {WAY}"
        )
    check_not_trained_privately("base_optimizer", base)


def check_not_trained_privately(name: str, optimizer: Any) -> None:
    """Refuses an optimizer of parameters of which Opacus takes the gradient of each sample."""
    if any(hasattr(parameter, "grad_sample") for group in optimizer.param_groups for parameter in group["params"]):
        raise InvalidArgumentError(
            f"{name} has parameters that Opacus has prepared (grad_sample), and its passes would be without clipping, "
            "noise and accounting, so that training would be without privacy; give make_private a plain optimizer, and "
            f"attach {WAY}, or end the private training with module.cleanup()"
        )


def private_parameter(output: Any) -> Tensor | None:
    """A parameter that Opacus trains, if a network's output was made with some: the nearest one decides."""
    if torch.compiler.is_compiling() or not isinstance(output, Tensor):
        return None
    stack, known = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaf = getattr(node, "variable", None)
        leaf = getattr(leaf, "orig_weight", leaf)  # of expanded weights, grad_sample_mode="ew"
        if isinstance(leaf, nn.Parameter):
            return leaf if hasattr(leaf, "grad_sample") else None
        stack.extend(next_node for next_node, _ in node.next_functions)
    return None


def check_unmixed(output: Any, what: str, instead: str) -> None:
    """Refuses a loss in which a sample depends on other samples, for the output of a network that Opacus trains."""
    if private_parameter(output) is not None:
        raise InvalidArgumentError(
            f"{what} makes the loss of a sample depend on other samples, so that clipping each sample's gradient, as "
            f"Opacus does, gives no privacy: {instead}"
        )


def clipped(loss: Tensor, output: Any) -> Tensor:
    """Returns ``loss``, a mean over the batch of ``output``; Opacus' ghost clipping, which cannot clip it, is refused.

    Ghost clipping multiplies each sample's own loss by its clipping factor, and anything added to these, such as a mean
    over the batch, by the sum of all factors.
    """
    parameter = private_parameter(output)
    if parameter is not None and loss.requires_grad:
        _check_clipped(parameter)
        loss.register_hook(functools.partial(_check_clipped, parameter))  # type: ignore[no-untyped-call]
    return loss


def _check_clipped(parameter: Tensor, _: Tensor | None = None) -> None:
    if hasattr(parameter, "_norm_sample"):
        raise InvalidArgumentError(
            "grad_sample_mode='ghost' cannot clip a loss that is added to Opacus' criterion as a mean over the batch, "
            "so that training would be without privacy: make_private(grad_sample_mode='hooks')"
        )
