"""The averaged network: how it is copied or checked, moved, run, and kept alike on all ranks."""

import copy
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from .._checks import check_integer, check_module, check_number
from .._distributed import local, unwrapped, wrappers_and_network
from ..errors import FlatminWarning, InvalidArgumentError

PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def ema_decay(epochs: float, steps_per_epoch: int) -> float:
    """Returns the decay of an exponential moving average whose horizon is a number of epochs.

    ``decay = 1 - 1 / (epochs * steps_per_epoch)``

    Choose a decay in this way. The same decay means another horizon on every data set: 0.9998 remembers 5,000 steps,
    which is 16 epochs of ImageNet at batch size 4096, and a whole run elsewhere.

    Args:
        epochs: Horizon in epochs, > 0.
        steps_per_epoch: Optimizer steps in an epoch, such as ``len(loader)``.

    Raises:
        InvalidArgumentError: (a ValueError) if the horizon is not longer than one step.

    Example:
        >>> import flatmin
        >>> flatmin.ema_decay(epochs=10, steps_per_epoch=50)
        0.998
    """
    horizon = check_number("epochs", epochs, above=0) * check_integer("steps_per_epoch", steps_per_epoch, least=1)
    if horizon <= 1:
        raise InvalidArgumentError(
            f"epochs * steps_per_epoch must be more than one step, got {epochs!r} * {steps_per_epoch}"
        )
    return 1 - 1 / horizon


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of ``model``, without its wrappers, frozen and in evaluation mode."""
    network = unwrapped(check_module("model", model))
    try:
        network = copy.deepcopy(network)
    except Exception as error:
        raise InvalidArgumentError(
            f"model cannot be copied ({error}): if it is to be sharded, make its average first, and then call "
            "fully_shard(model) and, in the same way, fully_shard(average.module)"
        ) from error
    return network.requires_grad_(False).eval()


def warn_if_too_coarse(network: nn.Module, decay: float) -> None:
    """Warns if the weights' dtype rounds each step of an average with ``decay`` away."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).eps > 1 - decay:
            warnings.warn(
                f"{name} is {parameter.dtype}, in which an average of decay {decay:.6g} does not move: keep the "
                "weights in float32 and compute in lower precision with torch.autocast",
                FlatminWarning,
                stacklevel=_depth_in_package(),
            )
            return


def check_alike(average: nn.Module, model: nn.Module) -> None:
    """Raises `InvalidArgumentError` unless ``average``, or its ``module``, has the parameters of ``model``."""
    if not isinstance(average, nn.Module):
        raise InvalidArgumentError(f"average must be a module with the parameters of model, got {average!r}")
    model, network = unwrapped(model), unwrapped(average)
    wanted, inner = _shapes(model), getattr(network, "module", None)
    if isinstance(inner, nn.Module) and _shapes(network) != wanted:
        network = unwrapped(inner)
    got = _shapes(network)
    if network is model:
        raise InvalidArgumentError("average must be another network than model, got model itself")
    for name in {**wanted, **got}:
        if wanted.get(name) != got.get(name):
            raise InvalidArgumentError(
                f"average must have the parameters of model: {name!r} is {got.get(name, 'missing')} in it and "
                f"{wanted.get(name, 'missing')} in model; make the average from this very model"
            )


def move(network: nn.Module, model: nn.Module, decay: float) -> None:
    """Makes one step of the exponential moving average, in its dtype; integer tensors are copied."""
    # AveragedModel.update_parameters would stall an accelerator by reading its counter, and round integer buffers
    # down, which corrupts index buffers (relative_position_index) for some decays, 0.95 and 0.9996 among them.
    theirs = _tensors(unwrapped(model))
    pairs = [(a, b.to(a)) for a, b in zip(_tensors(network), theirs, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        raise InvalidArgumentError(
            "model has tensors of other shapes than its average; if model is sharded, call fully_shard(average.module) "
            "in the same way, after the average was made"
        )
    averaged = [pair for pair in pairs if _is_averaged(pair[0])]
    if averaged:
        torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], 1 - decay)
    for a, b in pairs:
        if not _is_averaged(a):
            a.copy_(b)
    _share_buffers(network, model)


def overwrite(network: nn.Module, other: nn.Module) -> None:
    """Copies the weights and buffers of ``other`` into ``network``, wrapped or not."""
    network, other = unwrapped(network), unwrapped(other)
    for ours, theirs in zip(_tensors(network), _tensors(other), strict=True):
        ours.copy_(theirs)


def floating(network: nn.Module) -> list[Tensor]:
    """The weights and buffers that are averaged and not copied; of DTensors this rank's shards."""
    return [tensor for tensor in _tensors(network) if _is_averaged(tensor)]


@contextmanager
def evaluating(average: nn.Module) -> Iterator[None]:
    """Switches evaluation mode on and gradients off; on leaving, each module has its mode back."""
    training = [module for module in average.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        _reshard(average)


def _depth_in_package() -> int:
    """The stacklevel, for a warning of the function that calls this, of the first frame outside of flatmin."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        depth, frame = depth + 1, frame.f_back
    return depth


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(network: nn.Module) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in (*network.parameters(), *network.buffers())]


def _share_buffers(network: nn.Module, model: nn.Module) -> None:
    """Gives all replicas the first one's average of floating buffers.

    After a step each replica has batch-norm statistics of its own: DistributedDataParallel broadcasts the first one's
    only when the next forward pass begins.
    """
    for layer in wrappers_and_network(model):
        if isinstance(layer, nn.parallel.DistributedDataParallel) and layer.broadcast_buffers:
            buffers = [buffer for buffer in network.buffers() if _is_averaged(buffer)]
            if buffers and distributed.get_world_size(layer.process_group) > 1:
                distributed._broadcast_coalesced(layer.process_group, buffers, 2**28, 0)


def _reshard(network: nn.Module) -> None:
    """Frees what FSDP has gathered: it keeps the root's weights for a backward pass, which does not come here."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # if it is not loaded, nothing is sharded
        for module in network.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
