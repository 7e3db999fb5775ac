"""The modules of a network, in every step of a training: to look whether they are still the same is cheaper."""

from collections.abc import Callable, Iterable

from torch import nn


class Walk:
    """The modules of a network in their order, which are looked for anew where one has other children than before.

    Args:
        network: The network, which is kept alive.
        walk: Yields its modules.

    Attributes:
        network: The network.
    """

    def __init__(self, network: nn.Module, walk: Callable[[nn.Module], Iterable[nn.Module]]) -> None:
        self.network = network
        self._walk = walk
        self._modules: list[nn.Module] = []
        self._children: list[list[nn.Module | None]] = []

    def modules(self) -> list[nn.Module]:
        """The modules as they are now; the very same list if they are as before."""
        if not self._modules or self._children != _children(self._modules):
            self._modules = list(self._walk(self.network))
            self._children = _children(self._modules)
        return self._modules


def _children(modules: list[nn.Module]) -> list[list[nn.Module | None]]:
    return [list(module._modules.values()) for module in modules]
