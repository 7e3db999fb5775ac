"""The cards of the averages of the weights, which are evaluated in place of the network."""

from typing import Any

from torch import nn

from ...averages import EMA, LAWA, SwitchEMA, ema_decay
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


def _ema(given: Ingredients, settings: Settings) -> Assembled:
    ema = EMA(given.model, decay=decay_of(given, settings))
    ema.attach(given.optimizer)
    return Assembled(given.optimizer, average=ema, extra_bytes=size(ema))


def _switch_ema(given: Ingredients, settings: Settings) -> Assembled:
    average = SwitchEMA(given.model, decay=decay_of(given, settings), start_epoch=settings["start_epoch"])
    average.attach(given.optimizer)
    return Assembled(given.optimizer, average=average, extra_bytes=size(average), at_epoch_end=average.epoch_done)


def _lawa(given: Ingredients, settings: Settings) -> Assembled:
    lawa = LAWA(given.model, k=settings["k"])
    return Assembled(given.optimizer, average=lawa, extra_bytes=size(lawa), at_epoch_end=lawa.epoch_done)


# The classes have a decay; here a horizon in epochs is what can be compared between data sets.
CARDS = (
    Card(
        "ema",
        "the moving average of the weights, evaluated in their place",
        taken(None, ema_epochs=None, decay=None),
        _ema,
        stands_for=EMA,
        paper="Polyak and Juditsky 1992",
        choose="the learning rate does not fall to 0",
        memory="one copy of the network",
        complete=complete_horizon,
    ),
    Card(
        "switch_ema",
        "the moving average of the weights, from which each epoch continues",
        {**taken(SwitchEMA, "start_epoch"), **taken(None, ema_epochs=1.0, decay=None)},
        _switch_ema,
        stands_for=SwitchEMA,
        paper="Li et al. 2024, arXiv 2402.09240",
        choose="the learning rate does not fall to 0",
        memory="one copy of the network",
        complete=complete_horizon,
    ),
    Card(
        "lawa",
        "the mean of the weights at the ends of the last `k` epochs, evaluated in their place",
        taken(LAWA, "k"),
        _lawa,
        stands_for=LAWA,
        paper="Kaddour 2022, arXiv 2209.14981",
        choose="the learning rate does not fall to 0",
        memory="`k` + 1 copies of the network",
    ),
)
