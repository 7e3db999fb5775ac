"""The arguments of the methods: written out, the same in all that take them, documented, and refused by the rest."""

import inspect
import re

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim import Elementwise, Every, SharpnessAware
from flatmin.optim._one_pass import OnePass
from flatmin.optim._wrapper import Wrapper
from tests.contracts._optimizers import EVERY

MODEL = nn.Linear(2, 2, bias=False)
WEIGHT = MODEL.weight
ALL = {
    "parameters": [WEIGHT],
    "scaling": Elementwise(0.1),
    "scaler": torch.amp.GradScaler("cpu"),
    "max_norm": 1.0,
    "when": Every(2),
    "model": MODEL,
    "same_randomness": False,
    "norm": "global",
}
ONE = {"parameters", "scaling", "scaler", "max_norm", "model"}
TWO = ONE | {"when", "same_randomness"}
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
OWN = {
    "ASAM": ["eta"],
    "ESAM": ["beta", "gamma", "seed"],
    "GSAM": ["alpha"],
    "LookSAM": ["k", "alpha"],
    "FriendlySAM": ["sigma", "lam"],
}
DEFAULTS = dict.fromkeys(ALL) | {"same_randomness": True, "norm": "rank"}
# Where a method means something else by an argument, or another base optimizer is wanted.
OTHER_TEXT = {("LookSAM", "when"), ("MSAM", "base_optimizer"), ("SharpnessAware", "norm")}
OTHER_TEXT |= {("MSAM", "model"), ("S2SAM", "model")}
DOCUMENTED = {
    **EVERY,
    "SharpnessAware": SharpnessAware,
    "Elementwise": Elementwise,
    **{name: getattr(flatmin.optim, name) for name in ("Adaptive", "Every", "Late", "RhoByLR", "Sometimes")},
}


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([WEIGHT], lr=0.1, momentum=0.9)


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def described(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each argument, in one line each."""
    section = re.search(r"^Args:\n((?:    .*\n)+)", inspect.getdoc(kind) + "\n", re.MULTILINE).group(1)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def test_none_is_left_out():
    assert TAKEN.keys() == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("argument", ALL)
def test_each_takes_what_applies_to_it_and_python_refuses_the_rest(name, argument):
    given = {argument: ALL[argument]}
    if argument in TAKEN[name]:
        assert EVERY[name](sgd(), **given).base_optimizer
    else:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
            EVERY[name](sgd(), **given)


@pytest.mark.parametrize("name", EVERY)
def test_each_is_written_out_in_one_order_keyword_only_with_its_type(name):
    found = parameters(EVERY[name])
    shared = [argument for argument in ALL if argument in TAKEN[name]]
    assert list(found) == ["base_optimizer", "rho", *OWN.get(name, []), *shared]
    assert found["base_optimizer"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for argument, parameter in found.items():
        assert parameter.annotation is not inspect.Parameter.empty, argument
        assert argument == "base_optimizer" or parameter.kind is inspect.Parameter.KEYWORD_ONLY, argument
    with pytest.raises(TypeError, match="positional"):
        EVERY[name](sgd(), 0.05)


# As other libraries' SAM is made.
FOREIGN = {
    "a class": lambda kind: kind([WEIGHT], torch.optim.SGD, rho=0.05, lr=0.1),
    "a class by name": lambda kind: kind([WEIGHT], base_optimizer=torch.optim.SGD),
    "the base's": lambda kind: kind(sgd(), lr=0.1),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("way", FOREIGN)
def test_another_librarys_call_is_told_the_way(name, way):
    with pytest.raises(TypeError, match=rf"write {name}\(torch\.optim\.SGD\(.*\), rho=0\.05\)"):
        FOREIGN[way](EVERY[name])
    with pytest.raises(AttributeError, match=rf"{name} has no attribute 'set_closure'; give the closure to step"):
        EVERY[name](sgd()).set_closure(nn.functional.mse_loss)


def test_an_adaptive_sam_is_asam():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'adaptive'.*is flatmin\.ASAM"):
        flatmin.SAM(sgd(), adaptive=True)


def test_a_rho_of_a_group_is_refused_unless_it_is_the_bases_own():
    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step(lambda: (optimizer.zero_grad(), WEIGHT.square().sum().backward()))

    optimizer, other = flatmin.SAM(sgd()), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["rho"] = 0.1
    with pytest.raises(InvalidArgumentError, match=r"group has a rho, which would have no effect.*RhoByLR"):
        step(optimizer)
    for base in (torch.optim.Adadelta([WEIGHT]), [torch.optim.Adadelta([WEIGHT]), other]):
        step(flatmin.SAM(base))


@pytest.mark.parametrize("name", EVERY)
def test_a_shared_argument_has_one_default_everywhere(name):
    found = parameters(EVERY[name])
    for argument in TAKEN[name]:
        assert found[argument].default == DEFAULTS[argument], argument


def test_the_base_class_takes_all_of_them_and_perturbs_globally_unless_told():
    found = parameters(SharpnessAware)
    assert list(found) == ["base_optimizer", "rho", *ALL]
    assert found["rho"].default is inspect.Parameter.empty
    assert {name: found[name].default for name in ALL} == DEFAULTS | {"norm": "global"}
    assert {name: found[name].annotation for name in ALL} == {
        name: parameters(flatmin.SAM)[name].annotation for name in ALL
    }


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_says_something_of_each_and_states_its_default(name):
    found, said = parameters(DOCUMENTED[name]), described(DOCUMENTED[name])
    assert list(said) == list(found)
    for argument, parameter in found.items():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            shown = f'``"{default}"``' if isinstance(default, str) else str(default)
            stated = [f"{shown} (default)", f"{shown} (the default here)", f"default {shown}"]
            assert any(re.search(rf"{re.escape(way)}(?![\d.]\d)", said[argument]) for way in stated), argument


@pytest.mark.parametrize("name", [*EVERY, "SharpnessAware"])
def test_it_says_the_same_of_a_shared_argument_everywhere(name):
    expected, said = described(flatmin.SAM), described(DOCUMENTED[name])
    for argument in ["base_optimizer", *ALL]:
        if argument in said:
            assert (said[argument] == expected[argument]) == ((name, argument) not in OTHER_TEXT), argument


@pytest.mark.parametrize("name", EVERY)
def test_two_classes_stand_between_torchs_and_a_method(name):
    """Three for a one-pass method: what those share is one abstract class."""
    kinds = [kind for kind in EVERY[name].__mro__ if issubclass(kind, torch.optim.Optimizer)]
    shared = [OnePass] if EVERY[name].max_passes == 1 else []
    assert kinds == [EVERY[name], *shared, SharpnessAware, Wrapper, torch.optim.Optimizer]
    assert all(map(inspect.isabstract, kinds[1:-1]))


@pytest.mark.parametrize("max_norm", [0, -1, float("nan"), "x"])
def test_bad_max_norm_is_named_with_its_value(max_norm):
    with pytest.raises(InvalidArgumentError, match=f"^max_norm must .*{max_norm!r}"):
        flatmin.SAM(sgd(), max_norm=max_norm)


@pytest.mark.parametrize(
    ("optimizer", "shown"),
    [
        (lambda: flatmin.SAM(sgd(), rho=0.1), "SAM(rho=0.1, norm='rank') around SGD ("),
        (lambda: flatmin.GSAM(sgd(), max_norm=1), "GSAM(rho=0.04, alpha=0.01, max_norm=1.0) around SGD ("),
        (
            lambda: flatmin.MSAM(sgd(), rho=flatmin.optim.RhoByLR(3, 1, lr_max=0.1)),
            "MSAM(rho=RhoByLR(rho_max=3, rho_min=1, lr_max=0.1, lr_min=0.0)) around SGD (",
        ),
        (lambda: flatmin.ASAM(sgd()), "ASAM(rho=0.5, eta=0.01, norm='rank') around SGD ("),
    ],
)
def test_repr_shows_the_arguments_and_the_base_optimizer(optimizer, shown):
    found = repr(optimizer())
    assert found.startswith(shown)
    assert found.endswith(repr(sgd()))
