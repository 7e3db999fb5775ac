"""Schedules: in which steps the second pass runs (``when=``), and rho by the learning rate (``rho=``).

``when=`` takes a plain function of the step index to a bool, or a `Schedule`. A schedule may also look at the first
gradient, and have a state that is saved with the optimizer. Steps that were dropped do not count; on an accelerator,
where the optimizer does not wait for a step, one that is dropped counts for one step more.
"""

import inspect
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from .._checks import check_integer, check_mapping, check_number, shown
from ..errors import InvalidArgumentError

__all__ = ["Adaptive", "Every", "Late", "RhoByLR", "Schedule", "Sometimes"]


class Schedule(ABC):
    """Decides in which steps the second pass runs: the protocol of ``when=``.

    Derive from it for a schedule that looks at the gradient, or that has a state; for all else a plain function of the
    step index will do. Only `before` must be written. The order of calls in step ``step``:

    1. `before`: True or False decides; None leaves it to `after`.
    2. the first pass; then `after`, if `before` returned None.
    3. `observe`, if the step was made. `before` and `after` must not change the state, since a step may be dropped.

    Example:
        >>> class Rising(Schedule):
        ...     '''The second pass runs where the gradient is longer than in the step before.'''
        ...     def __init__(self):
        ...         self.last = 0.0
        ...     def before(self, step):
        ...         return None
        ...     def after(self, step, gradient_norm):
        ...         return gradient_norm > self.last
        ...     def observe(self, step, gradient_norm):
        ...         self.last = gradient_norm
        ...     def state_dict(self):
        ...         return {"last": self.last}
        ...     def load_state_dict(self, state_dict):
        ...         self.last = state_dict["last"]
        >>> Rising().after(0, 2.0)
        True
    """

    @abstractmethod
    def before(self, step: int) -> bool | None:
        """Decides before the first pass.

        Args:
            step: Index of the step, from 0.

        Returns:
            Whether the second pass runs. None: `after` decides. On several processes the first gradient is then
            averaged, so that all decide alike, and the perturbation is along it whatever ``norm=`` is.
        """

    def after(self, step: int, gradient_norm: float) -> bool:
        """Decides after the first pass, in steps for which `before` returned None.

        Args:
            step: Index of the step, from 0.
            gradient_norm: L2 norm of the first gradient over all parameters.
        """
        kind = type(self).__name__
        raise InvalidArgumentError(
            f"when: {kind}.before({step}) returned None, and {kind} has no after(step, gradient_norm); write one"
        )

    def observe(self, step: int, gradient_norm: float) -> None:  # noqa: B027 to have nothing to learn is usual
        """Called after each step that was made, with the index of the step and the norm of its first gradient."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, which is saved with the optimizer's; plain values and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 to have no state is usual
        """Loads what `state_dict` returned."""

    def __call__(self, step: int) -> bool | None:
        """The same as `before`: schedules can be combined in a plain function."""
        return self.before(step)


@dataclass(frozen=True)
class Every(Schedule):
    """The second pass runs in every ``k``-th step, from the first on.

    Args:
        k: Steps from one to the next, at least 1.

    Raises:
        InvalidArgumentError: (a ValueError) if ``k`` is not an integer of at least 1.

    Example:
        >>> [Every(3)(step) for step in range(5)]
        [True, False, False, True, False]
    """

    k: int

    def __post_init__(self) -> None:
        check_integer("k", self.k, least=1)

    def before(self, step: int) -> bool:
        """Whether the second pass of step ``step``, from 0, runs."""
        return step % self.k == 0


@dataclass(frozen=True)
class Late(Schedule):
    """The second pass runs in the last ``share`` of a run of ``steps`` steps.

    *Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training*, Zhou et al., ICLR 2025,
    arXiv 2410.10373: a few epochs at the end yield nearly what SAM in all of them does.
    A share of 0.1 to 0.3 is a rule of thumb, not the paper's.

    Args:
        share: Between 0 and 1.
        steps: Length of the run, in optimizer steps, at least 1.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its range.

    Example:
        >>> [Late(0.4, 5)(step) for step in range(5)]
        [False, False, False, True, True]
    """

    share: float
    steps: int

    def __post_init__(self) -> None:
        check_number("share", self.share, least=0, most=1)
        check_integer("steps", self.steps, least=1)

    def before(self, step: int) -> bool:
        """Whether the second pass of step ``step``, from 0, runs."""
        return step >= self.steps - round(self.share * self.steps)


@dataclass(frozen=True)
class Sometimes(Schedule):
    """The second pass of each step runs with a probability.

    *SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization*, Zhao et al. 2022, arXiv 2203.09962. The draw depends on
    the seed and the step index alone: it touches no generator of torch's, and is the same on all ranks and after a
    resume.

    Args:
        probability: Between 0 and 1; or a function of the step index to it.
        seed: Another seed draws other steps; default 0.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its range.

    Example:
        >>> sum(Sometimes(0.25)(step) for step in range(1000))
        240
    """

    probability: float | Callable[[int], float]
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.probability):
            check_number("probability", self.probability, least=0, most=1)
        check_integer("seed", self.seed, least=0)

    def before(self, step: int) -> bool:
        """Whether the second pass of step ``step``, from 0, runs."""
        probability = self.probability(step) if callable(self.probability) else self.probability
        return random.Random(f"{self.seed}:{step}").random() < probability


class Adaptive(Schedule):
    """The second pass runs where the first gradient is long compared with those of the past steps.

    *An Adaptive Policy to Employ Sharpness-Aware Minimization*, Jiang et al., ICLR 2023, arXiv 2304.14647::

        mean = decay * mean + (1 - decay) * |g|^2
        variance = decay * variance + (1 - decay) * (|g|^2 - mean)^2         both from 0
        second pass where |g|^2 >= mean + c * sqrt(variance),   c from start to end, linearly over the run

    The rule has been checked against descriptions of the paper; its constants, the defaults here, have not.

    Args:
        steps: Length of the run, in optimizer steps, at least 1.
        start: ``c`` at its beginning; default 1.0.
        end: ``c`` at its end; default -1.0: lower, so that more second passes run towards the end, where they matter.
        decay: Of the moving mean and variance, in [0, 1); default 0.9.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its range.

    Example:
        >>> when = Adaptive(100)
        >>> when.after(0, 2.0)
        True
    """

    def __init__(self, steps: int, *, start: float = 1.0, end: float = -1.0, decay: float = 0.9) -> None:
        self.steps = check_integer("steps", steps, least=1)
        self.start = check_number("start", start)
        self.end = check_number("end", end)
        self.decay = check_number("decay", decay, least=0, below=1)
        self._statistics = (0.0, 0.0)

    def before(self, step: int) -> None:
        """None: the gradient decides."""
        return

    def after(self, step: int, gradient_norm: float) -> bool:
        """Whether the second pass of step ``step``, from 0, runs, whose first gradient has this norm."""
        mean, variance = self._with(gradient_norm)
        done = min(step / self.steps, 1.0)
        return gradient_norm**2 >= mean + (self.start + (self.end - self.start) * done) * math.sqrt(variance)

    def observe(self, step: int, gradient_norm: float) -> None:
        """Counts a step that was made in the statistics."""
        self._statistics = self._with(gradient_norm)

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics."""
        return dict(zip(("mean", "variance"), self._statistics, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        check_mapping("state_dict", state_dict)
        mean, variance = state_dict.get("mean", 0.0), state_dict.get("variance", 0.0)
        self._statistics = (check_number("mean", mean, least=0), check_number("variance", variance, least=0))

    def _with(self, gradient_norm: float) -> tuple[float, float]:
        """The moving mean, and the moving variance around the new mean, after a gradient of this norm."""
        (mean, variance), value = self._statistics, gradient_norm**2
        mean = self.decay * mean + (1 - self.decay) * value
        return mean, self.decay * variance + (1 - self.decay) * (value - mean) ** 2


@dataclass(frozen=True)
class RhoByLR:
    """A rho that follows the learning rate linearly, to give as ``rho=``.

    GSAM's::

        rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)

    Args:
        rho_max: Rho at ``lr_max``, >= 0.
        rho_min: Rho at ``lr_min``, >= 0; at 0 the step there is a plain step of the base optimizer.
        lr_max: The highest learning rate of the run, of the first parameter group.
        lr_min: The lowest; default 0.0.

    Raises:
        InvalidArgumentError: (a ValueError) if one is negative, or ``lr_max`` is not above ``lr_min``.

    Example:
        >>> import torch
        >>> base = torch.optim.SGD([torch.zeros(1)], lr=0.05)
        >>> round(RhoByLR(0.04, 0.02, lr_max=0.1)(base), 6)
        0.03
    """

    rho_max: float
    rho_min: float
    lr_max: float = field(kw_only=True)
    lr_min: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("rho_max", "rho_min", "lr_min"):
            check_number(name, getattr(self, name), least=0)
        check_number("lr_max", self.lr_max, above=self.lr_min)

    def __call__(self, optimizer: Optimizer) -> float:
        """The rho of a step of ``optimizer``, at least 0."""
        share = (float(optimizer.param_groups[0]["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
        return max(self.rho_min + (self.rho_max - self.rho_min) * share, 0.0)


class _Function(Schedule):
    """A plain function of the step index as a schedule."""

    def __init__(self, function: Callable[[int], bool]) -> None:
        self.function = function

    def before(self, step: int) -> bool:
        return decided(self.function(step), step)


def as_schedule(when: Schedule | Callable[[int], bool] | None) -> Schedule:
    """Returns the schedule that is meant by the argument ``when``; every step for None."""
    if when is None:
        return Every(1)
    if isinstance(when, Schedule):
        kind = type(when)
        if (kind.state_dict is Schedule.state_dict) != (kind.load_state_dict is Schedule.load_state_dict):
            raise InvalidArgumentError(
                f"when: {kind.__name__} has one of state_dict and load_state_dict; write both, or it cannot be resumed"
            )
        return when
    if isinstance(when, type) or not callable(when):
        raise InvalidArgumentError(
            "when must be a function of the step index to a bool, or a flatmin.optim.schedules.Schedule such as "
            f"Every(5), got {shown(when)}"
        )
    if hasattr(when, "state_dict"):
        raise InvalidArgumentError(
            f"when: the state of {type(when).__name__} would not be saved; derive the class from "
            "flatmin.optim.schedules.Schedule"
        )
    try:
        inspect.signature(when).bind(0)
    except TypeError:
        raise InvalidArgumentError(f"when must take one argument, the index of the step, got {when!r}") from None
    except ValueError:  # some that are written in C have no signature
        pass
    return _Function(when)


def decided(answer: bool | None, step: int) -> bool:
    """Returns the answer of a schedule that has to decide."""
    if answer is None:
        raise InvalidArgumentError(f"when returned None for step {step}; return True where the second pass runs")
    return bool(answer)
