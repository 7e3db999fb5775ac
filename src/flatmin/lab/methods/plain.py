"""The cards of the plain optimizer, the control of every comparison, and of label smoothing."""

from torch import nn

from .card import Card, Settings
from .hyperparameters import taken
from .method import Assembled, Ingredients


def _base(given: Ingredients, settings: Settings) -> Assembled:
    return Assembled(given.optimizer)


CARDS = (
    Card(
        "base",
        "the plain optimizer",
        {},
        _base,
        use="torch.optim.SGD(...)",
        choose="as the control",
        private=lambda settings: True,
    ),
    Card(
        "smoothing",
        "the plain optimizer with label smoothing",
        taken(None, smoothing=0.1),
        _base,
        stands_for=nn.CrossEntropyLoss,
        use="CrossEntropyLoss(label_smoothing=0.1)",
        paper="Szegedy et al. 2016, arXiv 1512.00567",
        choose="always compare with it: it costs nothing",
        private=lambda settings: True,
    ),
)
