"""The registry and what it puts together."""

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.lab.methods import COMPARED, FORMER_NAMES, METHODS, Ingredients, get_method, resolve_settings
from flatmin.lab.methods.hyperparameters import HYPERPARAMETERS
from flatmin.lab.methods.stand_in import check_settings, put_together


def assemble(name, **given):
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    method = get_method(name)
    ingredients = Ingredients(model, base, num_samples=20, num_classes=3, steps_per_epoch=5, epochs=10)
    return model, base, method.assemble(ingredients, resolve_settings(method, given, epochs=10))


def test_the_methods_of_the_issue():
    family = [
        "sam",
        "sam_on",
        "late_sam",
        "ae_sam",
        "asam",
        "esam",
        "gsam",
        "look_sam",
        "friendly_sam",
        "msam",
        "s2sam",
    ]
    others = ["saf", "mesa", "online_label_smoothing", "logit_squeezing", "ema", "switch_ema", "lawa"]
    assert list(METHODS) == ["base", "smoothing", *family, *others]
    assert list(COMPARED) == ["base", "smoothing", "logit_squeezing", "sam", "saf", "mesa"]


def test_every_default_has_an_option_and_every_option_a_method():
    used = {name for method in METHODS.values() for name in method.defaults}
    assert used == set(HYPERPARAMETERS)


@pytest.mark.parametrize(("name", "near"), [("saff", "saf"), ("messa", "mesa"), ("smothing", "smoothing")])
def test_an_unknown_method_gets_the_nearest(name, near):
    with pytest.raises(InvalidArgumentError, match=f"unknown method '{name}', did you mean.* {near}"):
        get_method(name)


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_a_former_name_says_what_it_is_now(former, name):
    with pytest.raises(InvalidArgumentError, match=f"^unknown method '{former}'; it is now {name}$"):
        get_method(former)
    assert get_method(name).name == name


def test_an_unknown_hyperparameter_gets_the_nearest():
    with pytest.raises(InvalidArgumentError, match=r"saf has no hyperparameter 'coeficient', did you mean coefficient"):
        resolve_settings(METHODS["saf"], {"coeficient": 1.0}, epochs=10)


def test_settings_override_the_defaults():
    settings = resolve_settings(METHODS["saf"], {"lag": 2}, epochs=10)
    assert settings == {**METHODS["saf"].defaults, "lag": 2}
    assert METHODS["saf"].defaults["lag"] == 3


@pytest.mark.parametrize(
    ("given", "horizon"), [({}, 12.0), ({"ema_epochs": 3.0}, 3.0), ({"decay": 0.9}, None)], ids=str
)
def test_the_horizon_of_mesa_is_a_fifth_of_the_run_unless_said_otherwise(given, horizon):
    assert resolve_settings(METHODS["mesa"], given, epochs=60)["ema_epochs"] == horizon


def test_decay_and_horizon_exclude_each_other():
    with pytest.raises(InvalidArgumentError, match="exclude each other"):
        resolve_settings(METHODS["mesa"], {"decay": 0.9, "ema_epochs": 3.0}, epochs=60)


@pytest.mark.parametrize("name", ["base", "smoothing"])
def test_the_plain_methods_add_nothing(name):
    _, base, method = assemble(name)
    assert method.optimizer is base
    assert (method.trajectory, method.penalty, method.extra_bytes) == (None, None, 0)


def test_sam_wraps_the_base_optimizer_and_keeps_a_copy_of_the_weights():
    model, base, method = assemble("sam", rho=0.2)
    assert isinstance(method.optimizer, flatmin.SAM)
    assert method.optimizer.base_optimizer is base
    assert method.optimizer.rho == 0.2
    assert method.extra_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_saf_remembers_every_logit_of_lag_epochs():
    _, base, method = assemble("saf", coefficient=0.7, temperature=2.0, lag=2, start_epoch=4)
    saf = method.trajectory
    assert method.optimizer is base
    assert (saf.coefficient, saf.temperature, saf.lag, saf.start_epoch) == (0.7, 2.0, 2, 4)
    assert (saf.num_samples, saf.num_classes) == (20, 3)
    assert method.extra_bytes == 2 * 20 * (4 * 3 + 4)


@pytest.mark.parametrize(("given", "decay"), [({"ema_epochs": 4.0}, 1 - 1 / 20), ({"decay": 0.7}, 0.7), ({}, 0.9)])
def test_mesa_follows_the_optimizer_with_the_decay_that_was_asked_for(given, decay):
    model, base, method = assemble("mesa", **given)
    assert method.trajectory.decay == pytest.approx(decay)
    before = {name: value.clone() for name, value in method.trajectory.average.module.state_dict().items()}
    model(torch.ones(2, 4)).sum().backward()
    base.step()
    for name, value in method.trajectory.average.module.state_dict().items():
        torch.testing.assert_close(value, decay * before[name] + (1 - decay) * model.state_dict()[name])


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("always", [True] * 6),
        ("every:3", [True, False, False, True, False, False]),
        ("late:0.5", [False, False, False, True, True, True]),
        ("sometimes:0", [False] * 6),
        ("sometimes:1", [True] * 6),
        ("adaptive", [None] * 6),
    ],
)
def test_when_says_which_steps_pay(text, second):
    method = METHODS["sam"]
    settings = resolve_settings(method, {"when": text}, epochs=1)
    assert [method.second_pass(step, settings, 6) for step in range(6)] == second
    assert [method.calls(step, settings, 6) for step in range(6)] == [
        None if pay is None else 2 if pay else 1 for pay in second
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allways", "unknown when 'allways', did you mean always"),
        ("late", "'' is no number"),
        ("every:x", "'x' is no number; write such as"),
        ("every:0", "k must be an integer of at least 1, got 0"),
        ("late:2", "share must be .* got 2"),
    ],
)
def test_a_when_that_cannot_be_read_is_explained(text, message):
    with pytest.raises(InvalidArgumentError, match=message):
        assemble("sam", when=text)


def test_looksam_has_its_k_unless_when_says_otherwise():
    method = METHODS["look_sam"]
    second = [method.second_pass(step, resolve_settings(method, {"k": 3}, epochs=1), 6) for step in range(6)]
    assert second == [True, False, False, True, False, False]
    for text, when in (("late:0.1", flatmin.optim.Late(0.1, 50)), ("always", flatmin.optim.Every(1))):
        assert assemble("look_sam", when=text)[2].optimizer._when == when


def test_averages_follow_the_base_optimizer():
    model, base, method = assemble("ema", decay=0.5)
    before = model.weight.clone()
    model(torch.ones(2, 4)).sum().backward()
    base.step()
    torch.testing.assert_close(method.average.module.weight, (before + model.weight) / 2)
    assert assemble("switch_ema", decay=0.5)[2].average.decay == 0.5
    assert assemble("switch_ema")[2].average.decay == 1 - 1 / 5
    assert assemble("lawa", k=3)[2].average.k == 3


def test_squeezing_is_label_smoothing_at_temperature_1_and_the_variance_of_the_logits_at_a_high_one():
    logits, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def penalty(temperature):
        return assemble("logit_squeezing", coefficient=1.0, temperature=temperature)[2].penalty(logits, y, y, None)

    # CE(uniform) is KL(uniform || softmax) and the entropy of the uniform distribution
    uniform = nn.functional.cross_entropy(logits, torch.full((6, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(penalty(1.0) + torch.log(torch.tensor(3.0, dtype=torch.float64)), uniform)
    torch.testing.assert_close(penalty(1e3), logits.var(dim=1, correction=0).mean() / 2, rtol=1e-3, atol=0)


OWN = [(card, name) for card in METHODS.values() for name, known in card.hyperparameters.items() if known.bounds]


@pytest.mark.parametrize(("card", "name"), OWN, ids=[f"{card.name}.{name}" for card, name in OWN])
def test_the_bounds_that_the_help_states_are_those_of_the_classes(card, name):
    """The method is put together with what is just within them, and refuses by itself what is just outside."""
    bounds = card.hyperparameters[name].bounds
    step = 1 if bounds.integer else 1e-6
    low = bounds.least if bounds.least is not None else bounds.above
    inside = low if bounds.least is not None else low + step
    one_of = {"decay": {"ema_epochs": None}, "ema_epochs": {"decay": None}, "rho": {"rho_min": 0.0}}.get(name, {})
    one_of = {key: value for key, value in one_of.items() if key in card.hyperparameters}
    settings = {**resolve_settings(card, {}, epochs=9), **one_of, name: inside}
    check_settings(card, settings, 9, own=True)
    ends = (low if bounds.above is not None else low - step, bounds.below, 1.1 if bounds.most == 1 else None)
    for outside in (end for end in ends if end is not None):
        for own in (True, False):  # by the card and by the class
            with pytest.raises(InvalidArgumentError):
                check_settings(card, {**settings, name: outside}, 9, own=own)
        if name != "smoothing":  # the criterion's
            with pytest.raises(InvalidArgumentError):
                put_together(card, {**settings, name: outside}, 9)


def test_a_setting_is_checked_without_drawing_a_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    resolve_settings(METHODS["sam"], {"rho": 0.3}, epochs=3)
    assert torch.equal(torch.get_rng_state(), before)
