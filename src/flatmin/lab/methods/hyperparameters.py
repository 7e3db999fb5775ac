"""What the hyperparameters of flatmin's own methods are: type, help text and bounds of each, once.

Their defaults, and which method has them, stand in the cards.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ..._checks import Bounds
from .card import SMOOTHING, Card, Hyperparameter, signature_defaults

POSITIVE = Bounds(above=0)
FROM_ZERO = Bounds(least=0)
SHARE = Bounds(above=0, most=1)
MOMENTUM = Bounds(least=0, below=1)
COUNT = Bounds(integer=True, least=1)

HYPERPARAMETERS: dict[str, tuple[type, str, Bounds | None]] = {
    "smoothing": (SMOOTHING.kind, SMOOTHING.help, SMOOTHING.bounds),
    "rho": (float, "Length of the perturbation; gsam: at the highest learning rate.", Bounds(above=0, most=1e18)),
    "rho_min": (float, "rho at a learning rate of 0.", FROM_ZERO),
    "subset": (str, "Which parameters are perturbed: all | norm (normalisation layers only).", None),
    "when": (
        str,
        "Steps in which the second pass runs: always | every:K | late:SHARE | sometimes:PROBABILITY | adaptive.",
        None,
    ),
    "norm": (str, "On several processes, along whose gradient to perturb: rank (each its own) | global.", None),
    "eta": (float, "Added to each weight's size.", FROM_ZERO),
    "beta": (float, "Probability with which a tensor is perturbed.", SHARE),
    "gamma": (float, "Share of the samples in the second pass.", SHARE),
    "alpha": (
        float,
        "gsam: weight of the part that is removed; look_sam: of the part that is reused.",
        FROM_ZERO,
    ),
    "k": (int, "look_sam: steps from one second pass to the next; lawa: epochs whose ends are averaged.", COUNT),
    "sigma": (float, "Share of the gradients' moving mean that is subtracted.", FROM_ZERO),
    "lam": (float, "Momentum of that mean.", MOMENTUM),
    "coefficient": (float, "Weight of the method's loss; online_label_smoothing: of the soft labels.", FROM_ZERO),
    "temperature": (float, "Temperature of the method's loss.", POSITIVE),
    "start_epoch": (int, "First epoch, from 0, in which the method acts.", Bounds(integer=True, least=0)),
    "lag": (
        int,
        "Epochs between logits and the past ones they are compared with.",
        Bounds(integer=True, least=1, most=10_000),
    ),
    "history": (str, "Form of the history: dense | half | int8 | int6 | int4 | topk | lowrank | mean | auto.", None),
    "mean_momentum": (
        float,
        "Momentum of a running mean of past logits, in place of those lag epochs ago.",
        MOMENTUM,
    ),
    "ema_epochs": (
        float,
        "Horizon of the average in epochs; where not given, a fifth of the run, at least 2.",
        POSITIVE,
    ),
    "decay": (float, "Decay of the average, in place of ema_epochs.", Bounds(above=0, below=1)),
    "fraction": (float, "Share of each batch on which the average is run.", SHARE),
    "statistics": (
        str,
        "Batch-norm statistics with which the average, or a network trained at moved weights (msam, s2sam), is run: "
        "averaged or trained | fresh (made anew from training samples after each epoch) | batch (mesa alone: those of "
        "each batch).",
        None,
    ),
    "interval": (int, "The average is run in every interval-th step; the loss is 0 in the others.", COUNT),
}


def taken(source: Callable[..., Any] | None, *names: str, **stated: Any) -> dict[str, Hyperparameter]:
    """Hyperparameters with the defaults of a signature.

    Args:
        source: The class or function.
        *names: Those whose default is that of its argument.
        **stated: Others: what the argument is not called, or where the laboratory differs on purpose.
    """
    defaults = signature_defaults(source, *names) if source is not None else {}
    return {name: Hyperparameter(default, *HYPERPARAMETERS[name]) for name, default in {**defaults, **stated}.items()}


def option_help(name: str, cards: Iterable[Card]) -> str:
    """The help text of a hyperparameter: what it is, and which method has it, with which default."""
    every = list(cards)
    by_default: dict[Any, list[str]] = {}
    for card in every:
        if name in card.hyperparameters:
            by_default.setdefault(card.hyperparameters[name].default, []).append(card.name)
    whole = sum(map(len, by_default.values())) == len(every)
    most = max(by_default.values(), key=len)
    parts = [
        f"{_say(default)} for {'all others' if whole and some is most else ', '.join(some)}"
        for default, some in sorted(by_default.items(), key=lambda item: whole and item[1] is most)
    ]
    _, text, bounds = HYPERPARAMETERS[name]
    return f"{text}{f' ({bounds})' if bounds else ''}  [default: {'; '.join(parts)}]"


def _say(default: Any) -> str:
    return "not given" if default is None else default if isinstance(default, str) else f"{default:g}"
