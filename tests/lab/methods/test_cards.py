"""The cards: that they say what is so, and that the command's help is made from them."""

import dataclasses
import inspect
import re

import pytest
import torch
from torch import nn

from flatmin.errors import InvalidArgumentError
from flatmin.lab.methods import METHODS, Card, Hyperparameter, Ingredients, resolve_settings
from flatmin.lab.methods.hyperparameters import HYPERPARAMETERS, option_help
from flatmin.optim import SharpnessAware

# Where a card differs from the signature on purpose.
DIFFERS = {
    "sam": {"when"},  # None there, a word here; so for all
    "sam_on": {"rho", "when"},
    "late_sam": {"when"},
    "ae_sam": {"when"},
    "asam": {"when"},
    "esam": {"when"},
    "gsam": {"when"},
    "friendly_sam": {"when"},
    "saf": {"lag"},
    "ema": {"decay", "statistics"},
    "switch_ema": {"decay", "statistics"},
    "lawa": {"statistics"},
}
ARGUMENTS = {"mean_momentum": "momentum"}

every_card = pytest.mark.parametrize("card", METHODS.values(), ids=list(METHODS))


@every_card
def test_defaults_are_those_of_the_signature_but_where_it_is_said(card):
    if card.stands_for is None:
        return
    parameters = inspect.signature(card.stands_for).parameters
    compared = {name: ARGUMENTS.get(name, name) for name in card.defaults if ARGUMENTS.get(name, name) in parameters}
    differ = {name for name, argument in compared.items() if card.defaults[name] != parameters[argument].default}
    assert differ <= DIFFERS.get(card.name, set())
    assert compared or card.name in ("smoothing",)
    assert differ == DIFFERS.get(card.name, set()) & set(compared)


def test_a_default_that_changes_in_a_class_changes_in_its_card():
    from flatmin.lab.methods.hyperparameters import taken

    def penalty(logits, *, coefficient=0.125, temperature=7.0): ...

    found = taken(penalty, "coefficient", temperature=2.0)
    assert {name: known.default for name, known in found.items()} == {"coefficient": 0.125, "temperature": 2.0}
    with pytest.raises(KeyError):
        taken(penalty, "rho")


@every_card
def test_every_fact_is_there_and_plain(card):
    assert card.summary
    assert card.choose
    assert card.memory
    assert card.passes
    for text in (card.summary, card.choose, card.memory, card.passes):
        assert "|" not in text
        assert not text.endswith(".")
        assert not re.search(r"(?<!\d)\.\d", text)  # 0.5, not .5
    if card.stands_for is not None and card.name != "ema":
        assert re.search(r"[A-Z][\w-]+( et al\.| and \w+)? \d{4}, (arXiv \d{4}\.\d{4,5}|NeurIPS)", card.paper)
    assert all(known.help for known in card.hyperparameters.values())


COPIES = {"nothing": 0, "one copy": 1, "two copies": 2, "three copies": 3}


@every_card
def test_memory_and_passes_in_words_are_those_that_are_counted(card):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given = Ingredients(model, base, num_samples=20, num_classes=3, steps_per_epoch=5, epochs=10)
    assembled = card.assemble(given, resolve_settings(card, {}, epochs=10))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    words = re.fullmatch(r"(nothing|\w+ cop(?:y|ies))(?: of (.+))?", card.memory)
    if words is not None:
        of = {
            None: 0,
            "the weights": weights,
            "the network": weights,
            "those layers' weights": sum(parameter.nbytes for parameter in model[1].parameters()),
        }
        slack = 64 if words[2] == "the network" else 0  # counters
        assert 0 <= assembled.extra_bytes - COPIES[words[1]] * of[words[2]] <= slack
    elif card.name == "lawa":
        assert 0 <= assembled.extra_bytes - (card.defaults["k"] + 1) * weights <= 64
    else:
        numbers = {"saf": 3 * 20 * (3 + 1), "online_label_smoothing": 2 * 3 * 3}  # a sum, too
        assert assembled.extra_bytes == 4 * numbers[card.name]
    assert ("second pass" in card.passes) == (card.closure_calls > 1)
    assert card.closure_calls == 1 or isinstance(assembled.optimizer, SharpnessAware)


def test_help_says_which_methods_have_it_with_which_default():
    cards = METHODS.values()
    assert option_help("coefficient", cards).endswith(
        "[default: 0.3 for saf; 0.8 for mesa, logit_squeezing; 0.5 for online_label_smoothing]"
    )
    assert option_help("smoothing", cards).endswith("[default: 0.1 for smoothing; 0 for all others]")
    assert option_help("mean_momentum", cards).endswith("[default: not given for saf]")
    assert all(option_help(name, cards).startswith(text) for name, (_, text, _) in HYPERPARAMETERS.items())


def test_a_card_is_frozen_and_so_are_its_hyperparameters():
    card = METHODS["saf"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.name = "mine"
    with pytest.raises(TypeError):
        card.hyperparameters["lag"] = 2
    with pytest.raises(TypeError):
        METHODS["mine"] = card


def test_a_plain_value_is_the_default_of_a_hyperparameter_and_every_card_has_smoothing():
    card = Card("mine", "x", {"k": 3, "rho": 0.1, "form": "dense", "c": Hyperparameter(None, float)}, None)
    kinds = {name: known.kind for name, known in card.hyperparameters.items()}
    assert kinds == {"k": int, "rho": float, "form": str, "c": float, "smoothing": float}
    assert card.defaults == {"k": 3, "rho": 0.1, "form": "dense", "c": None, "smoothing": 0.0}
    assert Card("mine", "x", {"smoothing": 0.2}, None).defaults == {"smoothing": 0.2}


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("", {}, "name must be letters, digits"),
        ("a.b", {}, "name must be letters, digits.* got 'a.b'"),
        ("a b", {}, "name must be"),
        ("a/b", {}, "name must be"),
        ("1a", {}, "name must be"),
        ("_", {}, "name must be"),
        ("mine", {"a-b": 1.0}, "a hyperparameter of mine must have a name of Python, got 'a-b'"),
        ("mine", {"a": True}, "kind must be int, float or str"),
        ("mine", {"a": None}, "kind must be int, float or str"),
        ("mine", {"a": [1]}, "kind must be int, float or str"),
    ],
)
def test_a_card_that_cannot_be_is_refused(name, hyperparameters, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Card(name, "x", hyperparameters, None)


def test_a_default_of_another_kind_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"default must be of kind int, got 0\.5"):
        Hyperparameter(0.5, int)
    assert Hyperparameter(1, float).default == 1
