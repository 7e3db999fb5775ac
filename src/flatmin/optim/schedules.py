"""Which steps pay for a second pass.

Any function of the step's number, from 0, to a bool will do; these are the ones in the literature. Steps that were
dropped do not count.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._checks import check_integer, check_number
from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class Every:
    """Every ``k``-th step, from the first on.

    Example:
        >>> [Every(3)(step) for step in range(5)]
        [True, False, False, True, False]
    """

    k: int

    def __post_init__(self) -> None:
        check_integer("k", self.k, least=1)

    def __call__(self, step: int) -> bool:
        """Whether step number ``step``, from 0, pays."""
        return step % self.k == 0


@dataclass(frozen=True)
class Late:
    """The last ``share`` of a run of ``steps`` steps.

    *Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training*, Zhou et al., ICLR 2025,
    arXiv 2410.10373: a few epochs at the end yield nearly what SAM in all of them does.
    A share of .1 to .3 is a rule of thumb, not the paper's.

    Example:
        >>> [Late(0.4, 5)(step) for step in range(5)]
        [False, False, False, True, True]
    """

    share: float
    steps: int

    def __post_init__(self) -> None:
        check_number("share", self.share, least=0, most=1)
        check_integer("steps", self.steps, least=1)

    def __call__(self, step: int) -> bool:
        """Whether step number ``step``, from 0, pays."""
        return step >= self.steps - round(self.share * self.steps)


@dataclass(frozen=True)
class Sometimes:
    """Each step with a probability.

    *SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization*, Zhao et al. 2022, arXiv 2203.09962. What is drawn
    follows from the seed and the step's number alone: it touches no generator of torch's, is the same on all ranks and
    after a resume.

    Args:
        probability: In [0, 1]; or a function of the step's number to it.
        seed: Another draws other steps.

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

    def __call__(self, step: int) -> bool:
        """Whether step number ``step``, from 0, pays."""
        probability = self.probability(step) if callable(self.probability) else self.probability
        return random.Random(f"{self.seed}:{step}").random() < probability


def moving_statistics(mean: float, variance: float, value: float, decay: float) -> tuple[float, float]:
    """The moving mean, and the moving variance around the new mean, after ``value``."""
    mean = decay * mean + (1 - decay) * value
    return mean, decay * variance + (1 - decay) * (value - mean) ** 2


class Adaptive:
    """The steps whose gradient is large beside its own past, after the first pass has shown it.

    *An Adaptive Policy to Employ Sharpness-Aware Minimization*, Jiang et al., ICLR 2023, arXiv 2304.14647::

        mean = decay * mean + (1 - decay) * |g|^2
        variance = decay * variance + (1 - decay) * (|g|^2 - mean)^2         both from 0
        second pass where |g|^2 >= mean + c * sqrt(variance),   c from start to end, linearly over the run

    The rule has been checked against descriptions of the paper; its constants, the defaults here, have not.

    The whole batch's gradient decides, so that all ranks do the same: the first pass is synchronised, and the
    perturbation is along it, whatever the optimizer's ``norm`` is.

    Args:
        steps: Length of the run.
        start: ``c`` at its beginning.
        end: ``c`` at its end; lower, so that more steps pay, since the end is where it matters.
        decay: Of the statistics, in [0, 1).

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its range.

    Example:
        >>> when = Adaptive(100)
        >>> when(0, 2.0)
        True
    """

    def __init__(self, steps: int, *, start: float = 1.0, end: float = -1.0, decay: float = 0.9) -> None:
        self.steps = check_integer("steps", steps, least=1)
        self.start = check_number("start", start)
        self.end = check_number("end", end)
        self.decay = check_number("decay", decay, least=0, below=1)
        self._statistics = (0.0, 0.0)

    def __call__(self, step: int, norm: float) -> bool:
        """Whether step number ``step``, from 0, pays, whose gradient has the norm ``norm``."""
        mean, variance = moving_statistics(*self._statistics, norm**2, self.decay)
        done = min(step / self.steps, 1.0)
        return norm**2 >= mean + (self.start + (self.end - self.start) * done) * math.sqrt(variance)

    def observe(self, norm: float) -> None:
        """Counts a step that was made in the statistics."""
        self._statistics = moving_statistics(*self._statistics, norm**2, self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics."""
        return dict(zip(("mean", "variance"), self._statistics, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        mean, variance = state_dict.get("mean", 0.0), state_dict.get("variance", 0.0)
        self._statistics = (check_number("mean", mean, least=0), check_number("variance", variance, least=0))


When = Callable[[int], bool] | Adaptive


def check_when(when: When | None) -> When | None:
    """Returns ``when`` if steps can be chosen with it."""
    if when is None or (callable(when) and not isinstance(when, type)):
        return when
    raise InvalidArgumentError(
        f"when must be a function of the step's number to a bool, such as flatmin.optim.Every(5), got {when!r}"
    )
