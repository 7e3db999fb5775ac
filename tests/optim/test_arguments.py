"""The arguments that methods have in common: each takes those that apply to it, and says so of the others."""

import inspect

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim import Elementwise, Every
from tests.contracts._optimizers import EVERY

WEIGHT = nn.Parameter(torch.ones(2, 2))
ALL = {
    "parameters": [WEIGHT],
    "scaling": Elementwise(0.1),
    "scaler": torch.amp.GradScaler("cpu"),
    "max_norm": 1.0,
    "when": Every(2),
    "model": nn.Linear(2, 2),
    "same_randomness": False,
    "norm": "global",
}
ONE = {"parameters", "scaling", "scaler", "max_norm"}
TWO = ONE | {"when", "model", "same_randomness"}
TAKEN = {
    "SAM": TWO | {"norm"},
    "ASAM": (TWO | {"norm"}) - {"scaling"},
    "ESAM": TWO | {"norm"},
    "GSAM": TWO,
    "LookSAM": TWO,
    "FriendlySAM": TWO,
    "MSAM": ONE,
    "S2SAM": ONE,
}


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([WEIGHT], lr=0.1, momentum=0.9)


def test_none_is_left_out():
    assert TAKEN.keys() == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("argument", ALL)
def test_each_takes_what_applies_to_it_and_names_the_rest(name, argument):
    given = {argument: ALL[argument]}
    if argument in TAKEN[name]:
        assert EVERY[name](sgd(), **given).base_optimizer
    else:
        with pytest.raises(InvalidArgumentError, match=rf"^{name} (takes no {argument}|has its own {argument})"):
            EVERY[name](sgd(), **given)


def test_a_misspelt_argument_is_refused_with_all_that_there_are():
    with pytest.raises(InvalidArgumentError) as error:
        flatmin.GSAM(sgd(), alhpa=0.1)
    assert str(error.value) == (
        "GSAM takes no alhpa, did you mean alpha?; "
        "it takes rho, alpha, max_norm, model, parameters, same_randomness, scaler, scaling, when"
    )


@pytest.mark.parametrize("name", EVERY)
def test_the_docstring_names_all_of_them(name):
    documentation = inspect.getdoc(EVERY[name])
    for argument in TAKEN[name]:
        assert f"``{argument}``" in documentation or f"{argument}:" in documentation


@pytest.mark.parametrize("max_norm", [0, -1, float("nan"), "x"])
def test_bad_max_norm_is_named_with_its_value(max_norm):
    with pytest.raises(InvalidArgumentError, match=f"^max_norm must .*{max_norm!r}"):
        flatmin.SAM(sgd(), max_norm=max_norm)
