"""The cards of the averages of the weights, which are evaluated in place of the network."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..._checks import check_choice
from ...averages import EMA, LAWA, SwitchEMA, WeightAverage, ema_decay
from ...errors import InvalidArgumentError
from .card import Card, Settings
from .hyperparameters import taken
from .method import Assembled, Ingredients

# A moving average looks back over this share of the run where nothing else is said: 12 of 60 epochs. The paper's 0.9998
# is 5,000 steps, or 18 % of its 90 epochs of ImageNet.
EMA_SHARE = 0.2


def decay_of(given: Ingredients, settings: Settings) -> float:
    """The decay of an average, given or made from its horizon."""
    decay: float | None = settings["decay"]
    return ema_decay(settings["ema_epochs"], given.steps_per_epoch) if decay is None else decay


def complete_horizon(settings: dict[str, Any], given: Settings, epochs: int) -> dict[str, Any]:
    """Ties the horizon of an average to the run's length where neither it nor a decay is given.

    Raises:
        InvalidArgumentError: If both are.
    """
    horizon, decay = settings["ema_epochs"], settings["decay"]
    if decay is not None and given.get("ema_epochs") is None:
        horizon = None
    if horizon is not None and decay is not None:
        raise InvalidArgumentError("ema_epochs and decay exclude each other: give one of them")
    if horizon is None and decay is None:
        horizon = max(EMA_SHARE * epochs, 2.0)  # an epoch may be a single step
    return {**settings, "ema_epochs": horizon}


def size(module: nn.Module) -> int:
    """Bytes of a module's tensors, those of its extra state aside."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def as_they_are(batches: Iterable[Any]) -> None:
    """The ``refresh`` of a method whose batch-norm statistics are not made anew."""


def _evaluated(given: Ingredients, settings: Settings, average: WeightAverage, **options: Any) -> Assembled:
    refresh = average.refresh if settings["statistics"] == "fresh" else as_they_are
    return Assembled(given.optimizer, average=average, extra_bytes=size(average), refresh=refresh, **options)


def _statistics(settings: Settings) -> str:
    return check_choice("statistics", settings["statistics"], ("averaged", "fresh"))


def _ema(given: Ingredients, settings: Settings) -> Assembled:
    ema = EMA(given.model, decay=decay_of(given, settings), statistics=_statistics(settings))
    ema.attach(given.optimizer)
    return _evaluated(given, settings, ema)


def _switch_ema(given: Ingredients, settings: Settings) -> Assembled:
    switch = SwitchEMA(
        given.model,
        decay=decay_of(given, settings),
        start_epoch=settings["start_epoch"],
        statistics=_statistics(settings),
    )
    switch.attach(given.optimizer)
    return _evaluated(given, settings, switch, at_epoch_end=switch.switch)


def _lawa(given: Ingredients, settings: Settings) -> Assembled:
    lawa = LAWA(given.model, k=settings["k"], statistics=_statistics(settings))
    return _evaluated(given, settings, lawa, at_epoch_end=lawa.update)


# The classes have a decay; here a horizon in epochs is what can be compared between data sets. The classes cannot make
# statistics anew by themselves; the laboratory, which has the training set, does.
CARDS = (
    Card(
        "ema",
        "the moving average of the weights, evaluated in their place",
        taken(None, ema_epochs=None, decay=None, statistics="fresh"),
        _ema,
        stands_for=EMA,
        paper="Polyak and Juditsky 1992",
        choose="the learning rate does not fall to 0",
        private=lambda settings: True,
        memory="one copy of the network",
        complete=complete_horizon,
    ),
    Card(
        "switch_ema",
        "the moving average of the weights, from which each epoch continues",
        {**taken(SwitchEMA, "start_epoch"), **taken(None, ema_epochs=1.0, decay=None, statistics="fresh")},
        _switch_ema,
        stands_for=SwitchEMA,
        paper="Li et al. 2024, arXiv 2402.09240",
        choose="the learning rate does not fall to 0",
        private=lambda settings: True,
        memory="one copy of the network",
        complete=complete_horizon,
    ),
    Card(
        "lawa",
        "the mean of the weights at the ends of the last `k` epochs, evaluated in their place",
        taken(LAWA, "k", statistics="fresh"),
        _lawa,
        stands_for=LAWA,
        paper="Kaddour 2022, arXiv 2209.14981",
        choose="the learning rate does not fall to 0",
        private=lambda settings: True,
        memory="`k` + 1 copies of the network",
    ),
)
