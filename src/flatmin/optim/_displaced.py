"""Weights that are moved over several passes, and put back bit-identical."""

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from ._foreach import clones, copy_
from ._perturbation import forget_computed


class Displaced:
    """Weights that may be moved now.

    Attributes:
        clean: The moved parameters, with copies of them as they were; empty while none is moved.
    """

    def __init__(self) -> None:
        self.clean: dict[Tensor, Tensor] = {}
        self._stack = ExitStack()
        self._aside: list[Tensor] | None = None  # the moved weights, while the clean ones are in their place

    def move(self, parameters: list[Tensor], move: AbstractContextManager[list[Tensor]]) -> None:
        """Moves ``parameters`` by entering ``move``, which yields copies of them; `restore` leaves it."""
        self.clean = dict(zip(parameters, self._stack.enter_context(move), strict=True))

    def restore(self) -> None:
        """Puts the weights back, bit-identical; nothing where they are."""
        self.clean, self._aside = {}, None
        self._stack.close()

    def suspend(self) -> bool:
        """Puts the clean weights in place until `resume`, unseen by autograd; returns whether there was any to do."""
        if not self.clean or self._aside is not None:
            return False
        self._aside = clones(list(self.clean))
        self._write(list(self.clean.values()))
        return True

    def resume(self) -> None:
        """Ends `suspend`; nothing where it has ended."""
        aside, self._aside = self._aside, None
        if aside is not None:
            self._write(aside)

    @torch.no_grad()
    def _write(self, tensors: list[Tensor]) -> None:
        # a backward pass that reads the weights finds them as its forward pass has: they are the same bits by then
        with ExitStack() as stack:
            for parameter in self.clean:  # one by one, as torch 2.6 has it
                stack.enter_context(torch.autograd._unsafe_preserve_version_counter(parameter))
            copy_(list(self.clean), tensors)
        forget_computed()
