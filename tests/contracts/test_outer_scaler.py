"""perturb, restore and step in a float16 loop that owns its scaler: unscale_, scaler.step, update."""

import copy

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim import Adaptive, Every
from tests.contracts._optimizers import Training, assert_same, differ
from tests.contracts.test_perturb import perturbed, two


def scaled(name: str, scaler: torch.amp.GradScaler, *, known: bool, **options: object) -> Training:
    training = Training(name, **options)
    training.scaler = scaler
    if known:
        training.optimizer.scaler = scaler
    return training


def outside(training: Training, count: int, unscale: tuple[str, ...] = (), clip: float | None = None) -> None:
    """A float16 loop as torch's documentation has it; ``unscale`` says before which calls it unscales."""
    optimizer, scaler = training.optimizer, training.scaler
    for _ in range(count):
        training.closure()
        if "perturb" in unscale:
            scaler.unscale_(optimizer)
        if wanted := optimizer.perturb():
            training.closure()
            if "restore" in unscale:
                scaler.unscale_(optimizer)
            optimizer.restore()
        done = "restore" in unscale if wanted else "perturb" in unscale
        if "step" in unscale and not done:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(training.model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


def scaler_at(scale: float = 2.0**12, **options: object) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


UNSCALE = [(), ("step",), ("perturb",), ("perturb", "step"), ("restore",), ("perturb", "restore")]


MORE = [(unscale, more) for unscale in (("step",), ("perturb",)) for more in ({"max_norm": 0.1}, {"when": Every(2)})]


@two
@pytest.mark.parametrize(("unscale", "options"), [*((unscale, {}) for unscale in UNSCALE), *MORE])
def test_a_scaler_of_the_loops_changes_no_bit_wherever_it_unscales(name, unscale, options):
    """With a scale that changes on the way, by powers of two."""
    ours = scaled(name, scaler_at(growth_interval=2), known=True, **options)
    plain = Training(name, **options)
    outside(ours, 6, unscale), perturbed(plain, 6)
    assert ours.scaler.get_scale() == 2.0**15
    assert_same(ours.state(), plain.state())


@two
@pytest.mark.parametrize("unscale", [(), ("step",), ("perturb",), ("perturb", "restore")], ids="-".join)
def test_a_scaler_that_the_optimizer_was_not_given_is_found_or_asked_for(name, unscale):
    """As in the loops of trainers. From the first step on, but for an epsilon in the first, all is unscaled."""
    ours, plain = scaled(name, scaler_at(growth_interval=2), known=False), Training(name)
    if name == "FriendlySAM" and "perturb" not in unscale:
        with pytest.raises(InvalidArgumentError, match=r"FriendlySAM\(\.\.\., scaler=scaler\)"):
            outside(ours, 1, unscale)
        return
    outside(ours, 6, unscale), perturbed(plain, 6)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # LookSAM's epsilon is 1e-8 of what it keeps


def test_a_scaler_that_is_not_known_is_asked_for_where_its_scale_matters():
    training = scaled("SAM", scaler_at(), known=False, when=Adaptive(8))
    before = training.state()["model"]
    with pytest.raises(InvalidArgumentError, match=r"SAM has to know the GradScaler.*SAM\(\.\.\., scaler=scaler\)"):
        outside(training, 1)
    assert torch.equal(training.model[0].weight, before["0.weight"])
    training = scaled("GSAM", scaler_at(), known=False)
    with pytest.raises(InvalidArgumentError, match=r"its first gradient was scaled, and its second is not"):
        outside(training, 1, ("restore",))
    assert torch.equal(training.model[0].weight, before["0.weight"])


@two
@pytest.mark.parametrize("known", [True, False])
def test_clipping_between_restore_and_step_is_of_the_second_gradient_alone(name, known):
    if name == "FriendlySAM" and not known:
        return
    ours, plain = scaled(name, scaler_at(), known=known), Training(name, max_norm=0.1)
    outside(ours, 5, ("step",), clip=0.1), perturbed(plain, 5)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


KNOWN = [((), True), (("step",), True), (("perturb",), True), (("perturb", "restore"), True), (("step",), False)]


@two
@pytest.mark.parametrize(("unscale", "known"), KNOWN)
@pytest.mark.parametrize("number", [1, 2])
def test_an_overflow_skips_the_step_and_lowers_the_scale(name, unscale, number, known):
    if not known and name == "FriendlySAM":
        return
    training, twin = (scaled(name, scaler_at(), known=known, given=True) for _ in range(2))
    outside(training, 2, unscale), outside(twin, 2, unscale)
    before = training.state()
    training.factor[training.passes + number] = float("inf")
    outside(training, 1, unscale)
    assert training.optimizer.skipped_steps == 1
    assert training.scaler.get_scale() == 2.0**11
    assert_same(training.state(), before)
    outside(training, 3, unscale), outside(twin, 3, unscale)
    for a, b in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@two
@pytest.mark.parametrize("known", [True, False])
def test_in_float16_the_scale_is_found_and_weights_are_those_of_float32(name, known):
    if name == "FriendlySAM" and not known:
        return
    training = scaled(name, scaler_at(2.0**22), known=known, dtype=torch.float32, autocast=torch.float16, given=True)
    outside(training, 14, ("step",))
    made = training.optimizer.state_dict()["flatmin"]["step"]
    assert 0 < training.optimizer.skipped_steps == 14 - made < 10
    plain = Training(name, dtype=torch.float32, given=True)
    perturbed(plain, made)
    for a, b in zip(training.model.parameters(), plain.model.parameters(), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@two
def test_step_unscales_where_nobody_did(name):
    """As ``first_step`` and ``second_step`` do with ``scaler=``."""
    ours, plain = scaled(name, scaler_at(), known=True), Training(name)
    perturbed(ours, 4), perturbed(plain, 4)
    assert_same(ours.state(), plain.state())


def test_averages_skip_a_step_that_the_scaler_leaves_out():
    training = scaled("SAM", scaler_at(), known=True, given=True)
    average = flatmin.EMA(training.model, decay=0.5)
    average.attach(training.optimizer)
    outside(training, 2)
    before = copy.deepcopy(average.state_dict())
    training.factor[training.passes + 2] = float("inf")
    outside(training, 1)
    assert_same(average.state_dict(), before)
    outside(training, 1)
    assert differ({"model": before}, {"model": average.state_dict()})
