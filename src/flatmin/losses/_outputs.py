"""What networks take and return: how a batch is given, and where the logits are."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InvalidArgumentError


def find_logits(returned: Any, output: Callable[[Any], Any] | None) -> Any:
    """What ``output`` takes of what a network has returned; by itself ``logits`` of a dictionary or an object."""
    if output is not None:
        return output(returned)
    if isinstance(returned, Mapping) and "logits" in returned:
        return returned["logits"]
    return getattr(returned, "logits", returned)


def as_called(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Gives a batch that is a mapping as keyword arguments, if the network takes it in this way.

    Raises:
        InvalidArgumentError: If there is nothing, and the network takes something.
    """
    if not args and not kwargs:
        try:
            signature(network.forward).bind()
        except TypeError:
            raise InvalidArgumentError(
                "MESA was not given what the network was called with, on which it runs its average: mesa(logits, x), "
                "or with a dictionary mesa(logits, **batch)"
            ) from None
        except ValueError:  # its arguments are not known
            pass
    if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
        batch = dict(args[0])
        try:
            signature(network.forward).bind(**batch)
        except (TypeError, ValueError):  # it takes the mapping itself
            return args, kwargs
        return (), batch
    return args, kwargs


def are_labels(logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all that a network is called with is integers that might be the labels of ``logits``.

    Their shape is then that of the logits, without the dimension of classes if there is one class each; but for the
    batch, of which this may be a share.
    """
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].ndim:
        return False
    if args[0].is_floating_point() or args[0].is_complex():
        return False
    shape, rest = args[0].shape[1:], logits.shape[1:]
    return shape == rest or any(shape == rest[:at] + rest[at + 1 :] for at in range(len(rest)))


def needs_gradient(outputs: Any) -> bool:
    """Whether a gradient is wanted of any tensor."""
    return any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(outputs))


def check_order(logits: Any, *called: Any) -> None:
    """Refuses logits that come behind what the network was called with: these alone are computed with a gradient.

    Raises:
        InvalidArgumentError: If so.
    """
    if torch.is_grad_enabled() and not _is_computed(logits) and _is_computed(called):
        raise InvalidArgumentError(
            "MESA was given a tensor without gradient as the logits, and one with gradient as what the network was "
            "called with: the logits come first, mesa(logits, x)"
        )


def _is_computed(values: Any) -> bool:
    tensors = (each for each in tree_leaves(values) if isinstance(each, Tensor))
    return any(each.requires_grad and not each.is_leaf for each in tensors)


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor with a dimension in what a network has returned.

    Raises:
        InvalidArgumentError: If there is none.
    """
    for each in tree_leaves(outputs):
        if isinstance(each, Tensor) and each.ndim:
            return each
    raise InvalidArgumentError(f"logits must be a tensor, or hold one, got {type(outputs).__name__}")
