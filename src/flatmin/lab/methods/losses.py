"""The cards of the methods that add a loss to the criterion."""

from typing import Any

import torch
from torch import Tensor

from ..._checks import check_number
from ...losses import MESA, SAF, OnlineLabelSmoothing, logit_squeezing
from .averages import complete_horizon, decay_of, size
from .card import Card, Settings, signature_defaults
from .hyperparameters import taken
from .method import Assembled, Ingredients


def _saf(given: Ingredients, settings: Settings) -> Assembled:
    names = ("coefficient", "temperature", "lag", "start_epoch", "history")
    options = {name: settings[name] for name in names}
    if settings["mean_momentum"] is not None or settings["history"] == "mean":
        options["lag"] = None  # there is but one slot
    saf = SAF(given.num_samples, given.num_classes, momentum=settings["mean_momentum"], **options)
    saf.to(_device(given))
    return Assembled(given.optimizer, saf, lambda logits, y, index, inputs: saf(logits, index), saf.history.nbytes)


def _mesa(given: Ingredients, settings: Settings) -> Assembled:
    names = ("coefficient", "temperature", "start_epoch", "fraction", "interval", "statistics")
    mesa = MESA(given.model, decay=decay_of(given, settings), **{name: settings[name] for name in names})
    mesa.attach(given.optimizer)
    return Assembled(
        given.optimizer,
        mesa,
        lambda logits, y, index, inputs: mesa(logits, inputs),
        size(mesa.average),
        refresh=mesa.refresh if settings["statistics"] == "fresh" else None,
        prepare=mesa.prepare,
    )


def _online_label_smoothing(given: Ingredients, settings: Settings) -> Assembled:
    smoothing = OnlineLabelSmoothing(given.num_classes, coefficient=settings["coefficient"])
    smoothing.to(_device(given))
    kept = size(smoothing) + smoothing.sums.nbytes
    return Assembled(given.optimizer, smoothing, lambda logits, y, index, inputs: smoothing(logits, y), kept)


def _logit_squeezing(given: Ingredients, settings: Settings) -> Assembled:
    coefficient = check_number("coefficient", settings["coefficient"], least=0)
    temperature = check_number("temperature", settings["temperature"], above=0)

    def penalty(logits: Tensor, y: Tensor, index: Tensor, inputs: Any) -> Tensor:
        return logit_squeezing(logits, coefficient=coefficient, temperature=temperature)

    return Assembled(given.optimizer, penalty=penalty)


def _device(given: Ingredients) -> torch.device:
    return next(given.model.parameters()).device


CARDS = (
    Card(
        "saf",
        "divergence from the network's own logits `lag` epochs earlier",
        taken(
            SAF,
            *("coefficient", "temperature", "start_epoch", "history"),
            lag=3,  # as SAF's None means where it keeps no mean: a row of a comparison says which
            mean_momentum=signature_defaults(SAF, "momentum")["momentum"],
        ),
        _saf,
        stands_for=SAF,
        paper="Du et al. 2022, arXiv 2205.14083",
        choose="training long on fixed samples; compare with `logit_squeezing` first",
        memory='`lag` x samples rows of 4 x (classes + 1) bytes; about 100 with `history="lowrank"`',
        private=lambda settings: settings["history"] not in ("lowrank", "auto"),
    ),
    Card(
        "mesa",
        "divergence from the logits of the network's moving average",
        # The class has one decay, the authors'; here the average looks back over a share of the run, see `averages`.
        taken(
            MESA,
            *("coefficient", "temperature", "start_epoch", "fraction", "interval", "statistics"),
            ema_epochs=None,
            decay=None,
        ),
        _mesa,
        stands_for=MESA,
        paper="Du et al. 2022, arXiv 2205.14083",
        choose="wrong labels, mixup, streams of data",
        memory="one copy of the network",
        passes="a forward pass without gradient",
        private=lambda settings: settings["fraction"] == 1 and settings["statistics"] != "batch",
        complete=complete_horizon,
    ),
    Card(
        "online_label_smoothing",
        "soft labels: the mean past prediction of each class",
        taken(OnlineLabelSmoothing, "coefficient"),
        _online_label_smoothing,
        stands_for=OnlineLabelSmoothing,
        paper="Zhang et al. 2021, arXiv 2011.12562",
        choose="as label smoothing, where classes are alike",
        memory="classes x classes numbers",
    ),
    Card(
        "logit_squeezing",
        "SAF's loss with a uniform target: label smoothing at a temperature",
        taken(logit_squeezing, "coefficient", "temperature"),
        _logit_squeezing,
        stands_for=logit_squeezing,
        paper="Szegedy et al. 2016, arXiv 1512.00567; Kannan et al. 2018, arXiv 1803.06373",
        choose="first of all: it costs nothing, and it won our comparisons",
        private=lambda settings: True,
    ),
)
