"""Recipes and runs: what they refuse, and the way to disk and back."""

import dataclasses
import json

import pytest

from flatmin.errors import InvalidArgumentError
from flatmin.lab.recipe import Recipe, Run, check_choice


def test_the_defaults_of_the_issue():
    recipe = Recipe()
    assert (recipe.data, recipe.model, recipe.epochs, recipe.optimizer) == ("digits", "cnn", 60, "sgd")
    assert recipe.label_noise == 0
    assert recipe.momentum == 0.9


def test_every_field_explains_itself():
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(Recipe))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 1),
        ("image_size", 3),
        ("workers", -1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("label_noise", 1.0),
        ("label_noise", -0.1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1e-4),
    ],
)
def test_a_value_out_of_bounds_is_named(name, value):
    with pytest.raises(InvalidArgumentError, match=f"{name} must be .*{value!r}"):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "near"), [("optimizer", "sdg", "sgd"), ("optimizer", "adam", "adamw"), ("precision", "f32", None)]
)
def test_an_unknown_choice_gets_the_nearest(name, value, near):
    with pytest.raises(InvalidArgumentError, match=f"unknown {name} '{value}'") as caught:
        Recipe(**{name: value})
    assert near is None or f"did you mean {near}" in str(caught.value)


def test_a_choice_far_from_all_gets_no_suggestion():
    with pytest.raises(InvalidArgumentError) as caught:
        check_choice("method", "zzz", ("saf", "mesa"))
    assert "did you mean" not in str(caught.value)
    assert "saf, mesa" in str(caught.value)


def test_a_run_survives_the_way_through_json():
    run = Run(Recipe(epochs=7, lr=0.3, label_noise=0.2, flip=True), "saf", {"lag": 2, "coefficient": 0.1}, seed=5)
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_run_ignores_what_else_its_file_says():
    run = Run(Recipe(), "base", {"smoothing": 0.0})
    assert Run.from_json({**run.to_json(), "versions": {"torch": "1"}}) == run
