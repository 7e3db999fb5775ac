"""Leaves a model and all random numbers as they were."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._rng import preserved
from ..errors import FlatminWarning


@contextmanager
def undisturbed(
    model: nn.Module, device: torch.device, generators: Iterable[torch.Generator] = (), *, batch_statistics: bool
) -> Iterator[None]:
    """Puts a model into evaluation mode inside; on leaving, every module's mode and all random states are as before.

    Modules with a ``train()`` of their own, which may fold weights into others, are told of both as by ``model.eval()``
    and ``model.train()``; afterwards their weights and buffers are bit-identical.

    Args:
        model: The network.
        device: Where it is; this device's random state is kept too.
        generators: Others that are kept, such as a DataLoader's own.
        batch_statistics: Whether batch- and instance-norm layers are in training mode all the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    kept = _Kept(model)
    states = [(generator, generator.get_state()) for generator in generators]
    with preserved(device):
        try:
            model.eval()
            kept.warn_if_changed()
            if batch_statistics:
                for module in model.modules():
                    module.training = isinstance(module, _NormBase)
            # Whatever the caller is in: gradients are needed here, and the precision is the one asked for.
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            if kept:
                for module, mode in modes:  # from the outside in, so that what is inside has the last word
                    if module.training != mode:
                        module.train(mode)
            for module, mode in modes:
                module.training = mode
            kept.restore()
            for generator, state in states:
                generator.set_state(state)


class _Kept:
    """Copies of the parameters and buffers in modules that have a ``train()`` of their own; false without any."""

    def __init__(self, model: nn.Module) -> None:
        self._copies: list[tuple[nn.Module, Tensor, Tensor]] = []
        for module in model.modules():
            # What another library has replaced on the instance counts too.
            if type(module).train is not nn.Module.train or "train" in vars(module):
                tensors = [*module.parameters(), *module.buffers()]
                self._copies += [(module, tensor, tensor.detach().clone()) for tensor in tensors]

    def __bool__(self) -> bool:
        return bool(self._copies)

    def warn_if_changed(self) -> None:
        """Warns of a module whose weights or buffers are others in evaluation mode."""
        changed = next((module for module, tensor, copy in self._copies if not _same(tensor, copy)), None)
        if changed is not None:
            warnings.warn(
                f"{type(changed).__name__} changes its weights when eval() is called, as merged LoRA weights do: "
                "sharpness is that of the network in evaluation mode, where parameters that are folded into others "
                "have no slope; switch the folding off to measure them",
                FlatminWarning,
                stacklevel=2,
            )

    def restore(self) -> None:
        """Gives what has changed its values back."""
        with torch.no_grad():
            for _, tensor, copy in self._copies:
                if not _same(tensor, copy):
                    tensor.data = copy if tensor.shape != copy.shape else tensor.data.copy_(copy)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the values are equal; NaN, as of a network that has diverged, is equal to itself here."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
