"""The random numbers of a run: drawn anew for each epoch, from its seed and the epoch alone."""

from collections.abc import Mapping
from typing import Any

import torch

from ... import _distributed, _rng


class Randomness:
    """All generators that a run draws from.

    Whatever random numbers a method has used, the order of the batches and the augmentation of an epoch follow from the
    seed and the epoch, so that runs of different methods with the same seed see the same.

    Args:
        seed: The run's.
        device: Where it trains.

    Attributes:
        order: Draws the order of the batches, the same on all ranks.
        augmentation: Draws crops and flips, which differ between ranks.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.order = torch.Generator()
        self.augmentation = torch.Generator()
        self._loaded: Mapping[str, Any] = {}  # for the middle of an epoch
        _rng.seed_all(seed)

    def begin_epoch(self, epoch: int) -> None:
        """Seeds every generator for an epoch."""
        seed = self.seed * 1_000_003 + epoch
        self.order.manual_seed(seed)
        seed += 999_983 * _distributed.rank()  # dropout, crops and flips differ between ranks
        self.augmentation.manual_seed(seed)
        _rng.seed_all(seed)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every generator on this rank."""
        return {
            **_rng.state_dict(self.device),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
        }

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self._loaded = states
        self.go_on()

    def go_on(self) -> None:
        """Sets every generator to the state that was loaded, once the batches before it have been drawn again."""
        _rng.load_state_dict(self._loaded, self.device)
        self.order.set_state(self._loaded["order"])
        self.augmentation.set_state(self._loaded["augmentation"])
