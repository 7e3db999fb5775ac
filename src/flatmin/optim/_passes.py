"""Makes a step pass by pass, whoever makes the passes: a closure, or a loop of the user's."""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from .._distributed import size
from ..errors import InvalidArgumentError, NonFiniteGradientWarning
from ._step import NotFiniteError, Passes, Step
from ._wrapper import Around

Closure = Callable[..., Any]


class InPasses(Around, ABC):
    """An optimizer whose step is some passes, and then the base optimizer's step.

    A step is a generator that yields where a pass is due: to close it puts back all that the step has moved.
    """

    _closure = "def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss"
    _without_closure = (
        "; or make the passes in a loop: for _ in optimizer.passes(): ..., or use first_step, second_step"
    )
    _most_passes: ClassVar[int] = 2  # in a step
    norm: str

    def __init__(self, base_optimizer: Optimizer) -> None:
        super().__init__(base_optimizer)
        self.skipped_steps = 0
        self._under_way = False
        self._suspended: Generator[int, None, None] | None = None  # the step that first_step has begun
        self._over = False  # whether first_step has made a whole step

    @abstractmethod
    def _begin(self, closure: Closure | None) -> Step:
        """A new step, of which nothing is done."""

    @abstractmethod
    def _gradient(self, step: Step) -> Passes:
        """Yields where a pass is due, and leaves the gradient to step with.

        Writes to memory after the last pass only, since any pass may fail.
        """

    @abstractmethod
    def _made(self, step: Step) -> None:
        """Told of a step that was made."""

    @torch.no_grad()
    def step(self, closure: Closure | Step | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss, as torch's
                own optimizers expect it. Called twice; once by one-pass methods, in steps that do not pay, and where
                the first gradient is not finite.

        Returns:
            The loss of the first call; of two-pass methods at the unperturbed weights.

        Raises:
            InvalidArgumentError: If there is no closure, or it leaves no gradient.
            Exception: Whatever the closure raises; the weights are then as they were.
        """
        step = closure if isinstance(closure, Step) else self._called(closure)  # `passes` has made them already
        if step.failed:
            if self.skipped_steps == 0 and not step.scale.enabled:
                warnings.warn(
                    f"the {step.failed} gradient of a {type(self).__name__} step is not finite: the step was dropped "
                    "and the weights are as they were (said once; skipped_steps counts them)",
                    NonFiniteGradientWarning,
                    stacklevel=4,  # step, torch's two wrappers
                )
            self.skipped_steps += 1
        else:
            self.base_optimizer.step()
            self._made(step)
        return step.loss

    def passes(self) -> Generator[int, None, None]:
        """Makes one step in a loop over its passes, where no closure can be given.

        The loop's body is what the closure would be: it clears the gradients, computes the loss and calls
        ``backward()``. After the last pass the base optimizer steps. To ``break``, or raise, gives the step up: the
        weights are then as they were, to the bit.

        Yields:
            The number of the pass, from 0.

        Raises:
            InvalidArgumentError: If a pass leaves no gradient.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
            >>> for number in optimizer.passes():
            ...     optimizer.zero_grad()
            ...     weight.square().sum().backward()
        """
        step = self._begin(None)
        with closing(self._run(step)) as passes:
            for number in itertools.count():
                with torch.no_grad():
                    if next(passes, step) is step:
                        break
                yield number
        self.step(step)

    def first_step(self) -> bool:
        """Moves the weights, after the first backward pass; in one-pass methods before the only one.

        For loops written for optimizers with two steps. `passes` does more: here the first pass is over before the
        optimizer knows of it, so that dropout takes other masks in the second, and no rank can have kept its gradient
        to itself.

        Returns:
            Whether another backward pass is wanted, and `second_step` after it. Where not, the step is made, or was
            dropped, and a `second_step` does nothing.

        Raises:
            InvalidArgumentError: If there is no gradient, or one step is under way already.
        """
        if self.norm == "rank" and size() > 1:
            raise InvalidArgumentError(
                "first_step comes after the gradients are averaged, and norm='rank' is for those of one rank; "
                f"make it {type(self).__name__}(..., norm='global'), or use passes()"
            )
        suspended = self.passes()
        for _ in range(self._most_passes):
            wanted = next(suspended, None) is not None
        self._suspended, self._over = (suspended, False) if wanted else (None, True)
        return wanted

    def second_step(self) -> None:
        """Restores the weights and makes the step, with the gradients of the pass after `first_step`.

        Raises:
            InvalidArgumentError: If there was no `first_step`, or there is no gradient.
        """
        suspended, over, self._suspended, self._over = self._suspended, self._over, None, False
        if suspended is not None:
            next(suspended, None)
        elif not over:
            raise InvalidArgumentError("second_step comes after first_step, which has not been called")

    def abandon(self) -> None:
        """Gives up the step that `first_step` has begun: all is as it was before, the weights to the bit."""
        suspended, self._suspended, self._over = self._suspended, None, False
        if suspended is not None:
            suspended.close()

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("a copy")
        return super().__getstate__()

    def _called(self, closure: Closure | None) -> Step:
        """A step whose passes the closure has made."""
        if closure is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step needs a closure, to take the gradient where it chooses: "
                f"{self._closure}{self._without_closure}"
            )
        step, calls = self._begin(closure), 0
        with closing(self._run(step)) as passes:
            for calls, _ in enumerate(passes):
                with torch.enable_grad():
                    loss = step.closure()  # type: ignore[misc]
                step.loss = loss if calls == 0 else step.loss
        return step

    def _run(self, step: Step) -> Passes:
        """The passes of a step, up to the gradient that the base optimizer is to step with."""
        self._check_idle("another step")
        self._under_way = True
        try:
            yield from self._gradient(step)
            step.clip()
        except NotFiniteError as error:
            step.failed = str(error)
            step.scale.overflowed(step.gradients)
        finally:
            self._under_way = False

    def _check_idle(self, what: str) -> None:
        if self._under_way:
            raise InvalidArgumentError(
                f"{what} while a step is under way, at perturbed weights perhaps: let its last pass be made, as "
                "second_step() does, or give it up with abandon()"
            )
