"""Spectral norm in an average: its singular vectors, u and v, are those of the average's own weights."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from ._layers import modules


def renew_vectors(network: nn.Module, iterations: int) -> None:
    """Makes steps of the power iteration with the weights of ``network``, from the vectors it has."""
    for layer in modules(network):
        if "parametrizations" in layer._modules and is_parametrized(layer):
            for name, parametrizations in layer.parametrizations.items():  # type: ignore[union-attr, operator]
                norms = [each for each in parametrizations if isinstance(each, _SpectralNorm)]
                if norms and not _sharded(parametrizations):
                    for norm in norms:
                        norm.train()
                    for _ in range(iterations):
                        getattr(layer, name)
                    for norm in norms:
                        norm.eval()
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm) and not _sharded(layer):
                for _ in range(iterations):
                    hook.compute_weight(layer, do_power_iteration=True)


def _sharded(module: Any) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())
