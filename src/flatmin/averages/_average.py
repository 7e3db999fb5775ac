"""The averaged network: how it is checked, moved, run, and kept alike on all ranks."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from .._checks import check_integer, check_number, shown
from .._distributed import unwrapped
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ._layers import named_parameters
from ._modes import evaluation_mode, in_modes_of
from ._pairs import Kind, Pair, pairs
from ._spectral import renew_vectors
from ._statistics import replicas


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


def warn_if_too_coarse(network: nn.Module, decay: float) -> None:
    """Warns if the weights' dtype rounds each step of an average with ``decay`` away."""
    for name, parameter in named_parameters(network):
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).eps > 1 - decay:
            warnings.warn(
                f"{name} is {parameter.dtype}, in which an average of decay {decay:.6g} does not move: keep the "
                "weights in float32 and compute in lower precision with torch.autocast",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
            return


def check_alike(average: nn.Module, model: nn.Module) -> nn.Module:
    """Returns ``average``, or its ``module``, whichever has the parameters of ``model``.

    Raises:
        InvalidArgumentError: If neither has.
    """
    if not isinstance(average, nn.Module):
        raise InvalidArgumentError(f"average must be a module with the parameters of model, got {shown(average)}")
    model, network = unwrapped(model), unwrapped(average)
    wanted, inner = _shapes(model), getattr(network, "module", None)
    if isinstance(inner, nn.Module) and _shapes(network) != wanted:
        network = unwrapped(inner)
    got = _shapes(network)
    if not wanted:
        raise InvalidArgumentError(f"model has no parameters to average, got {shown(model)}; give the network itself")
    if network is model:
        raise InvalidArgumentError("average must be another network than model, got model itself")
    for name in {**wanted, **got}:
        if wanted.get(name) != got.get(name):
            raise InvalidArgumentError(
                f"average must have the parameters of model: {name!r} is {got.get(name, 'missing')} in it and "
                f"{wanted.get(name, 'missing')} in model; make the average from this very model"
            )
    return network


def move(network: nn.Module, model: nn.Module, decay: float, *, statistics: bool = True) -> None:
    """Makes one step of the exponential moving average, in its dtype; see `pairs` for what is copied.

    Args:
        network: The average.
        model: The network that is trained.
        decay: Share of the average that stays.
        statistics: Whether running means and variances are averaged too, or left alone.
    """
    # AveragedModel.update_parameters would stall an accelerator by reading its counter, and round integer buffers
    # down, which corrupts index buffers (relative_position_index) for some decays, 0.95 and 0.9996 among them.
    with in_modes_of(network, model):
        averaged, copied = list[Pair](), list[Pair]()
        for pair in pairs(network, model):
            if pair.kind is Kind.COPIED:
                copied.append(pair)
            elif pair.kind is Kind.STATE:
                pair.ours.copy_(averaged_where_finite(pair.ours, pair.theirs.to(pair.ours), 1 - decay))
            elif pair.kind is Kind.WEIGHTS or (statistics and pair.kind is Kind.STATISTICS):
                averaged.append(pair)
        if copied:
            torch._foreach_copy_([pair.ours for pair in copied], [pair.theirs for pair in copied])
        if averaged:
            theirs = [pair.theirs.to(pair.ours) for pair in averaged]
            torch._foreach_lerp_([pair.ours for pair in averaged], theirs, 1 - decay)
        renew_vectors(network, iterations=3)  # spectral_norm's own make one, and lag behind fast weights
    _share_buffers(network, model)


def averaged_where_finite(ours: Tensor, theirs: Tensor, weight: float) -> Tensor:
    """``lerp``, and ``theirs`` where that is not finite: two equal infinities, a range that has just been found."""
    moved = torch.lerp(ours, theirs, weight)
    return torch.where(moved.isfinite(), moved, theirs)


def put_into(model: nn.Module, network: nn.Module) -> None:
    """Copies the weights and buffers of ``network``, an average, into ``model``; buffers of another shape stay."""
    with in_modes_of(network, model):
        for pair in pairs(network, model, follow=False):
            pair.theirs.copy_(pair.ours)


@contextmanager
def evaluating(average: nn.Module) -> Iterator[None]:
    """Switches evaluation mode on and gradients off; on leaving, each module has its mode back."""
    try:
        with evaluation_mode(average), torch.no_grad():
            yield
    finally:
        _reshard(average)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in named_parameters(network)}


def _share_buffers(network: nn.Module, model: nn.Module) -> None:
    """Gives all replicas the first one's average of floating buffers.

    After a step each replica has batch-norm statistics of its own: DistributedDataParallel broadcasts the first one's
    only when the next forward pass begins.
    """
    group = replicas(model)
    if group is None:
        return
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point() or buffer.is_complex()]
    if buffers:
        distributed._broadcast_coalesced(group, buffers, 2**28, 0)


def _reshard(network: nn.Module) -> None:
    """Frees what FSDP has gathered: it keeps the root's weights for a backward pass, which does not come here."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # if it is not loaded, nothing is sharded
        for module in network.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
