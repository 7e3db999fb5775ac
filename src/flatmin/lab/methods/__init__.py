"""The training methods: a card each, and the registry that the command and the comparison find them in by name.

A method of your own takes part in everything. Register its card at the top level of an experiment file::

    from flatmin.lab import methods

    def assemble(given, settings):
        def penalty(logits, y, index, inputs):
            return settings["strength"] * logits.square().mean()

        return methods.Assembled(given.optimizer, penalty=penalty)

    methods.register(methods.Card("small_logits", "the mean square of the logits", {"strength": 0.1}, assemble))

and then ``flatmin compare my_experiment.py --methods base,small_logits --set small_logits.strength=0.1,1``, or
``flatmin train my_experiment.py --method small_logits --set strength=1``.

``METHODS`` has every card by its name, and cannot be written to. ``COMPARED`` are the names that are compared where no
others are given. ``FORMER_NAMES`` says what a method is called now that committed results have under another name.
"""

from .card import Card as Card
from .card import Hyperparameter as Hyperparameter
from .method import Assembled as Assembled
from .method import Ingredients as Ingredients
from .registry import COMPARED as COMPARED
from .registry import FORMER_NAMES as FORMER_NAMES
from .registry import METHODS as METHODS
from .registry import get_method as get_method
from .registry import register as register
from .registry import resolve_settings as resolve_settings
from .sam_family import parse_when as parse_when
from .settings import parse_own_settings as parse_own_settings
from .settings import parse_settings as parse_settings

__all__ = [
    "Assembled",
    "COMPARED",
    "Card",
    "FORMER_NAMES",
    "Hyperparameter",
    "Ingredients",
    "METHODS",
    "get_method",
    "parse_own_settings",
    "parse_settings",
    "parse_when",
    "register",
    "resolve_settings",
]
