"""How a network is copied for its average, and which of its hooks the average has."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._checks import check_module, shown
from .._distributed import unwrapped
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ._layers import LeftOut, is_beside, layers, named_buffers, named_layers, named_parameters

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD = ("_backward_hooks", "_backward_pre_hooks")  # of no use to an average, which runs without gradient


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of ``model``, without its wrappers and what stands beside it, frozen and in evaluation mode.

    Forward hooks are copied only if they belong to the network: torch's own, such as those of
    ``torch.nn.utils.spectral_norm`` and ``prune``, and methods of objects within the network, which become the copy's.
    Others, such as functions that keep features, are not, and a warning names their layers; not those of flatmin's
    optimizers, which watch the network that they train.
    """
    network = unwrapped(check_module("model", model))
    refuse_lazy(network)
    if next(named_parameters(network), None) is None:
        raise InvalidArgumentError(f"model has no parameters to average, got {shown(model)}; give the network itself")
    memo = {**_computed(network), **_beside(network)}
    for layer in layers(network):
        memo.update({id(getattr(layer, name)): OrderedDict() for name in (*HOOKS, *BACKWARD)})
    try:
        made = copy.deepcopy(network, memo)
        dropped = _copy_hooks(network, made, memo)
    except Exception as error:
        raise InvalidArgumentError(f"model cannot be copied ({error}): {_way_out(network, error)}") from error
    if dropped:
        warnings.warn(
            f"the average runs without the forward hooks of {', '.join(dropped)}: functions may keep what they see, as "
            "those that gather features do; if one changes what a layer computes, register it on average.module too",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )
    return made.requires_grad_(False).eval()


def refuse_lazy(model: nn.Module) -> None:
    """Raises `InvalidArgumentError` if a layer does not know its shape yet."""
    for name, tensor in (*named_parameters(unwrapped(model)), *named_buffers(unwrapped(model))):
        if is_lazy(tensor):
            raise InvalidArgumentError(
                f"model cannot be copied yet, since its {name} has no shape: call model once with a batch, and then "
                "make the average"
            )


@contextmanager
def without_hooks_of(network: nn.Module, model: nn.Module) -> Iterator[None]:
    """Inside, an average that somebody else has copied runs without the functions that are hooks of the model too."""
    theirs = list(layers(unwrapped(model)))
    shared = {id(hook) for layer in theirs for name in HOOKS for hook in getattr(layer, name).values()}
    before = []
    if shared:
        for layer in layers(network):
            for hooks in (getattr(layer, name) for name in HOOKS):
                if any(id(hook) in shared and not of_torch(hook) for hook in hooks.values()):
                    before.append((hooks, list(hooks.items())))
                    kept = [(key, hook) for key, hook in hooks.items() if id(hook) not in shared or of_torch(hook)]
                    hooks.clear()
                    hooks.update(kept)
    try:
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)


def _computed(network: nn.Module) -> dict[int, Any]:
    """Copies of the tensors that layers have computed and keep as plain attributes, which deepcopy refuses.

    Old ``weight_norm``, ``spectral_norm`` and ``prune`` keep such a weight, and compute it anew in every pass.
    """
    values = [value for layer in layers(network) for value in vars(layer).values()]
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}


def _beside(network: nn.Module) -> dict[int, Any]:
    """What takes the place of the averages and losses that the network holds, as submodules or not."""
    held = (value for layer in layers(network) for value in (*layer._modules.values(), *vars(layer).values()))
    return {id(value): LeftOut() for value in held if isinstance(value, nn.Module) and is_beside(value)}


def _copy_hooks(network: nn.Module, made: nn.Module, memo: dict[int, Any]) -> list[str]:
    """Gives the copy the hooks that belong to the network; returns the names of layers with others."""
    dropped: dict[str, None] = {}
    copies = dict(made.named_modules(remove_duplicate=False))
    for path, layer in named_layers(network):
        for name in HOOKS:
            kept = OrderedDict()
            for key, hook in getattr(layer, name).items():
                if of_torch(hook) or id(_owner(hook)) in memo:
                    kept[key] = copy.deepcopy(hook, memo)
                elif not _of(hook, "flatmin"):  # an optimizer's, which watches the network alone
                    dropped[path or type(layer).__name__] = None
            if path in copies:
                setattr(copies[path], name, kept)
    return list(dropped)


def _owner(hook: Callable[..., Any]) -> Any:
    """The object whose method a hook is, or the hook itself."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", hook)


def of_torch(hook: Callable[..., Any]) -> bool:
    """Whether a hook is torch's own, and no module's."""
    return _of(hook, "torch") and not isinstance(_owner(hook), nn.Module)


def _of(hook: Callable[..., Any], package: str) -> bool:
    owner = _owner(hook)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return bool(module.split(".")[0] == package)


def _way_out(network: nn.Module, error: Exception) -> str:
    if "FSDP" in str(error) or any(hasattr(parameter, "to_local") for parameter in network.parameters()):
        return (
            "if it is to be sharded, make its average first, and then call fully_shard(model) and, in the same way, "
            "fully_shard(average.module)"
        )
    return "take out of it what copy.deepcopy cannot copy, or give the class that has it a __deepcopy__"
