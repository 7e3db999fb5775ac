"""The card of DP-SAT, and which methods may train with differential privacy."""

from collections.abc import Sequence
from typing import Any

from ..._checks import check_choice
from ...errors import InvalidArgumentError
from .card import Card, Hyperparameter, Settings
from .hyperparameters import taken
from .method import Assembled, Ingredients

DIRECTIONS = ("gradient", "step")


def _dpsat(given: Ingredients, settings: Settings) -> Assembled:
    check_choice("direction", settings["direction"], DIRECTIONS)

    def attach(module: Any, optimizer: Any) -> None:
        from ...integrations.opacus import DPSAT  # needs Opacus

        DPSAT(module=module, optimizer=optimizer, rho=settings["rho"], direction=settings["direction"])

    parameters = [parameter for group in given.optimizer.param_groups for parameter in group["params"]]
    return Assembled(given.optimizer, attach=attach, extra_bytes=2 * sum(each.nbytes for each in parameters))


CARDS = (
    Card(
        "dpsat",
        "DP-SGD at weights moved along the last privatised gradient; with --private alone",
        {
            **taken(None, rho=0.01),
            "direction": Hyperparameter("gradient", str, "Along what to move: gradient | step (the last change)."),
        },
        _dpsat,
        use="flatmin.integrations.opacus.DPSAT",
        paper="Park et al. 2023, arXiv 2306.05651",
        choose="under differential privacy, after plain DP-SGD",
        memory="two tensors of the weights' size",
        private=lambda settings: True,
    ),
)
# Methods compared where training is private and no others are named, and the values that make rows of one of them.
COMPARED = ("base", "smoothing", "logit_squeezing", "saf", "mesa", "dpsat")
ROWS: dict[str, dict[str, Sequence[Any]]] = {"dpsat": {"direction": list(DIRECTIONS)}}


def check_privacy(label: str, card: Card, settings: Settings, *, private: bool) -> None:
    """Refuses a method that cannot train with differential privacy where it is asked for, and one that needs it.

    Args:
        label: What the method, with its settings, is called.
        card: The method.
        settings: All its settings.
        private: Whether training is to be private.

    Raises:
        InvalidArgumentError: With the way out.
    """
    if not private and card in CARDS:
        raise InvalidArgumentError(f"{label} trains with differential privacy alone: --private EPSILON")
    if private and not card.private(settings):
        raise InvalidArgumentError(
            f"{label} cannot train with differential privacy, since it would take gradients without noise, or mix "
            f"samples in a loss; with --private there are {', '.join(COMPARED)}, ema, switch_ema and lawa, saf without "
            'history="lowrank" or "auto", mesa without fraction, and methods of your own whose card has private='
        )
