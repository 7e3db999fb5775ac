"""Which calls of a loss have the same number: the second pass of a step has those of the first."""

import torch

from .._passes import Pass, current_pass, steps


class Calls:
    """Counts calls.

    Attributes:
        count: Of the calls so far.
        seed: Each call draws its random numbers with ``seed + number``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seed = torch.initial_seed() % 2**32
        self._pass: Pass | None = None  # that the last call was in
        self._step_began = 0  # the call with which its step began
        self._ended: int | None = None  # how many steps had ended at the last call

    def next(self) -> int:
        """The number of this call."""
        now, before, self._pass = current_pass(), self._pass, current_pass()
        ended, self._ended = self._ended, steps()
        if self._ended != ended:  # a loop may make the first pass before the optimizer knows of it
            self._step_began = self.count
        if now is not None and now.second and not (before is not None and before.second and before.step is now.step):
            self.count = self._step_began
        call, self.count = self.count, self.count + 1
        return call

    def coming(self) -> int:
        """The number that the next call will have."""
        kept = dict(vars(self))
        try:
            return self.next()
        finally:
            vars(self).update(kept)
