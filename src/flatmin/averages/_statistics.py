"""The statistics that normalisation layers keep: which an average has, and how they are made anew.

The exponential mean of the statistics of many networks is that of none of them, and not that of their average either.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from .._distributed import unwrapped, wrappers_and_network
from ..errors import InvalidArgumentError
from ._layers import named_layers

CHOICES = ("averaged", "batch", "fresh")
BUFFERS = ("running_mean", "running_var")


def keeps_statistics(layer: nn.Module) -> bool:
    """Whether a layer moves a running mean and variance in training: batch norm, tracking instance norm, their like."""
    kept = all(isinstance(layer._buffers.get(name), Tensor) for name in BUFFERS)
    return kept and hasattr(layer, "momentum")  # frozen batch norm, of torchvision for one, has none


def moving_layers(network: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The layers of ``network`` whose statistics move when ``model`` is trained.

    Those that the model keeps in evaluation mode while it trains (frozen batch norm) are left out.
    """
    model = unwrapped(model)
    frozen = {name for name, layer in named_layers(model) if not layer.training} if model.training else set()
    return [layer for name, layer in named_layers(network) if keeps_statistics(layer) and name not in frozen]


@contextmanager
def own_statistics(network: nn.Module, model: nn.Module) -> Iterator[None]:
    """Inside, each batch is normalised with its own statistics; the running ones do not move."""
    layers = moving_layers(network, model)
    kept = [(layer, layer.training, dict(layer._buffers)) for layer in layers]
    tracked = [layer for layer in layers if isinstance(layer, _NormBase)]
    hooks = []
    try:
        for layer in layers:
            if isinstance(layer, _NormBase):  # without running statistics it takes the batch's in evaluation mode too
                layer.running_mean = layer.running_var = None
                layer.track_running_stats = False
            else:  # a layer of somebody's own is let move copies
                own = {name: buffer.clone() for name, buffer in layer._buffers.items() if buffer is not None}
                layer._buffers.update(own)
                hooks.append(layer.register_forward_pre_hook(_train))  # after whoever else sets modes in the call
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training, buffers in kept:
            layer._buffers.update(buffers)
            if layer.training != training:
                layer.train(training)
        for layer in tracked:
            layer.track_running_stats = True


@torch.no_grad()
def refresh(network: nn.Module, model: nn.Module, batches: Iterable[Any]) -> None:
    """Makes the statistics of ``network`` anew: the means over ``batches``, as ``torch.optim.swa_utils.update_bn``.

    Other than there, dropout is off, the layers' counters stay as they are, and an error changes nothing.

    Args:
        network: An average; or ``model`` itself, whose layers keep their modes.
        model: The network that is trained, with its wrappers.
        batches: Tensors; tuples or lists that begin with one; or dictionaries of keyword arguments. Of `Indexed`
            batches, which begin with the index, what they hold beside it.

    Raises:
        InvalidArgumentError: If there is no batch.
    """
    layers = moving_layers(network, model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    kept = [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    before = [buffer.clone() for buffer in kept]
    statistics = [getattr(layer, name) for layer in layers for name in BUFFERS]
    device, count, done = next(network.parameters(), statistics[0]).device, 0, False
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        network.eval()
        for layer in layers:
            layer.train()
        for buffer in statistics:
            buffer.zero_()
        for count, batch in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1 / count  # type: ignore[assignment]  # None would mean this, but not to instance norm
            _call(network, tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch))
        if _merge(statistics, model, count) == 0:
            raise InvalidArgumentError("batches must hold at least one batch to make statistics from, got none")
        done = True
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for layer, training in modes:
            layer.training = training
        made = {id(buffer) for buffer in statistics} if done else set()
        for buffer, value in zip(kept, before, strict=True):
            if id(buffer) not in made:
                buffer.copy_(value)


def replicas(model: nn.Module) -> Any:
    """The process group over which a model's buffers are kept alike; None if they are not, or there is no other."""
    for layer in wrappers_and_network(model):
        if isinstance(layer, nn.parallel.DistributedDataParallel) and layer.broadcast_buffers:
            return layer.process_group if distributed.get_world_size(layer.process_group) > 1 else None
    return None


def _train(layer: nn.Module, _: Any) -> None:
    layer.train()


def _call(network: nn.Module, batch: Any) -> None:
    if getattr(batch, "_fields", None) == ("index", "sample"):  # `flatmin.indices.Indexed`
        batch = batch.sample
    if isinstance(batch, Mapping):
        network(**batch)
    else:
        network(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _merge(statistics: list[Tensor], model: nn.Module, count: int) -> int:
    """Takes the mean over all replicas, each weighted with its batches; returns how many batches there were."""
    if (group := replicas(model)) is None:
        return count
    counts = torch.tensor(float(count), device=statistics[0].device)
    distributed.all_reduce(counts, group=group)
    for buffer in statistics:
        buffer.mul_(count / counts.clamp(min=1))
        distributed.all_reduce(buffer, group=group)
    return int(counts)
