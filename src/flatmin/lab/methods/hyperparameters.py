"""What the hyperparameters of flatmin's own methods are: type and help text of each, once.

Their defaults, and which method has them, stand in the cards.
"""

from collections.abc import Callable, Iterable
from typing import Any

from .card import SMOOTHING, Card, Hyperparameter, signature_defaults

HYPERPARAMETERS: dict[str, tuple[type, str]] = {
    "smoothing": (SMOOTHING.kind, SMOOTHING.help),
    "rho": (float, "Length of the perturbation; gsam: at the highest learning rate."),
    "rho_min": (float, "rho at a learning rate of 0."),
    "subset": (str, "Which parameters are perturbed: all | norm (normalisation layers only)."),
    "when": (
        str,
        "Steps in which the second pass runs: always | every:K | late:SHARE | sometimes:PROBABILITY | adaptive.",
    ),
    "norm": (str, "On several processes, along whose gradient to perturb: rank (each its own) | global."),
    "eta": (float, "Added to each weight's size."),
    "beta": (float, "Probability with which a tensor is perturbed."),
    "gamma": (float, "Share of the samples in the second pass."),
    "alpha": (float, "gsam: weight of the part that is removed; look_sam: of the part that is reused."),
    "k": (int, "look_sam: steps from one second pass to the next; lawa: epochs whose ends are averaged."),
    "sigma": (float, "Share of the gradients' moving mean that is subtracted."),
    "lam": (float, "Momentum of that mean."),
    "coefficient": (float, "Weight of the method's loss; online_label_smoothing: of the soft labels."),
    "temperature": (float, "Temperature of the method's loss."),
    "start_epoch": (int, "First epoch, from 0, in which the method acts."),
    "lag": (int, "Epochs between logits and the past ones they are compared with."),
    "history": (str, "Form of the history: dense | half | int8 | int6 | int4 | topk | lowrank | mean | auto."),
    "mean_momentum": (
        float,
        "Momentum of a running mean of past logits, in place of those lag epochs ago.",
    ),
    "ema_epochs": (float, "Horizon of the average in epochs; where not given, a fifth of the run, at least 2."),
    "decay": (float, "Decay of the average, in place of ema_epochs."),
    "fraction": (float, "Share of each batch on which the average is run."),
    "statistics": (
        str,
        "Batch-norm statistics of the average: averaged | fresh (made anew from training samples after each epoch) | "
        "batch (mesa alone: those of each batch).",
    ),
    "interval": (int, "The average is run in every interval-th step; the loss is 0 in the others."),
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
    return f"{HYPERPARAMETERS[name][1]}  [default: {'; '.join(parts)}]"


def _say(default: Any) -> str:
    return "not given" if default is None else default if isinstance(default, str) else f"{default:g}"
