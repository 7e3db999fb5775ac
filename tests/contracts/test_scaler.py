"""Training in float16 and bfloat16: torch's GradScaler, whatever the method does with its gradients."""

import pytest
import torch
from torch.amp import GradScaler

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.optim import Adaptive
from tests.contracts._optimizers import CLOSED, CLOSURES, EVERY, TRAINED, Training, assert_same, differ, each_pass

every = pytest.mark.parametrize("name", TRAINED)
closures = pytest.mark.parametrize("name", CLOSED)


def scaler(scale: float = 2.0**12, **options) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


@every
@pytest.mark.parametrize("how", ["plain", "clipped", "adaptive"])
def test_all_that_a_method_sees_and_keeps_is_unscaled(name, how):
    """A power of two changes no bit: weights, momenta, what is stored and the statistics are those without a scaler."""

    def train(scaler):
        options = {"max_norm": 0.1} if how == "clipped" else {}
        if how == "adaptive" and TRAINED[name].max_passes == 2:
            options["when"] = Adaptive(8, start=0.3, end=-0.3)
        training = Training(name, scaler=scaler, **options)
        return training.step(6), training.state()

    (losses, state), (others, expected) = train(scaler()), train(None)
    assert losses == others
    assert_same(state, expected)


@every
def test_float16_learns_what_float32_does_and_the_scale_grows(name):
    half = Training(name, dtype=torch.float32, autocast=torch.float16, scaler=scaler(growth_interval=4))
    single = Training(name, dtype=torch.float32)
    half.step(8), single.step(8)
    assert half.optimizer.skipped_steps == 0
    assert half.scaler.get_scale() == 2.0**14
    for key, weight in single.state()["model"].items():
        torch.testing.assert_close(half.model.state_dict()[key], weight, rtol=0.05, atol=0.02)
    assert half.model[0].weight.dtype == torch.float32


@every
def test_a_scaler_that_the_optimizer_was_not_given_is_noticed(name):
    training = Training(name)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.scaler = scaler()
    if training.own_passes:  # ESAM makes the backward pass itself, and is to be told
        return
    with pytest.raises(InvalidArgumentError, match=rf"{name} was not given.*{name}\(\.\.\., scaler=scaler\)"):
        training.step()
    assert_same([parameter.detach() for parameter in training.model.parameters()], before)
    other = scaler()  # of another optimizer, and used before
    other.scale(torch.ones(()))
    training.scaler = None
    training.step(2)


@closures
def test_it_is_noticed_without_a_closure_too(name):
    training = Training(name)
    training.scaler = scaler()
    with pytest.raises(InvalidArgumentError, match=rf"{name} was not given.*{name}\(\.\.\., scaler=scaler\)"):
        training.loop()


@closures
@pytest.mark.parametrize("loop", ["step", "loop"])
@pytest.mark.parametrize("known", ["used before", "resumed"])
def test_so_is_one_that_was_used_before_and_one_of_a_resumed_run(name, loop, known):
    training, used = Training(name), scaler()
    if known == "used before":  # of another network, or of the same with another optimizer
        used.scale(torch.ones(()))
        training.step(2)
    else:
        used.load_state_dict({**scaler().state_dict(), "scale": 2.0**10})
        before = Training(name)
        before.step(2)
        training.optimizer.load_state_dict(before.optimizer.state_dict())
    training.scaler = used
    weights = [parameter.detach().clone() for parameter in training.model.parameters()]
    with pytest.raises(InvalidArgumentError, match=rf"{name} was not given.*{name}\(\.\.\., scaler=scaler\)"):
        getattr(training, loop)()
    assert_same([parameter.detach() for parameter in training.model.parameters()], weights)
    assert "scale" not in vars(used)


@pytest.mark.parametrize("name", [name for name in CLOSURES if EVERY[name].max_passes == 1])
def test_one_that_the_closure_of_a_single_pass_unscales_by_itself_is_left_alone(name):
    """With two passes torch refuses to unscale in the second."""
    (weights, same), used = (torch.nn.Parameter(torch.ones(2)) for _ in range(2)), scaler()
    for weight, given in ((weights, True), (same, False)):
        optimizer = EVERY[name](torch.optim.SGD([weight], lr=0.1, momentum=0.9))
        for _ in range(3):

            def closure(optimizer=optimizer, weight=weight, given=given):
                optimizer.zero_grad()
                loss = weight.square().sum()
                (used.scale(loss) if given else loss).backward()
                if given:
                    used.unscale_(optimizer)
                return loss

            optimizer.step(closure)
            if given:
                used.update()
    assert torch.equal(weights, same)


@pytest.mark.parametrize("name", CLOSURES)
def test_it_is_said_where_the_first_backward_pass_was_over_before_the_optimizer_knew(name):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = EVERY[name](torch.optim.SGD([weight], lr=0.1))

    def backward(by=lambda loss: loss):
        by(weight.square().sum()).backward()

    used = scaler()
    if optimizer.max_passes == 2:
        backward(used.scale)
    optimizer.perturb()
    backward(used.scale)
    optimizer.restore()
    with pytest.warns(FlatminWarning, match=rf"before the first step of {name}.*{name}\(\.\.\., scaler=scaler\)"):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in CLOSURES if EVERY[name].max_passes == 2])
def test_that_is_said_of_a_scaler_that_was_used_before_too(name):
    weight, used = torch.nn.Parameter(torch.ones(2)), scaler()
    optimizer = EVERY[name](torch.optim.SGD([weight], lr=0.1))

    def steps(scale, count):
        for _ in range(count):
            scale(weight.square().sum()).backward()
            if optimizer.first_step(zero_grad=True):
                scale(weight.square().sum()).backward()
                optimizer.second_step(zero_grad=True)

    used.scale(torch.ones(()))
    used.update(2.0)  # of another network
    steps(lambda loss: loss, 1)
    with pytest.warns(FlatminWarning, match=rf"before a step of {name}.*{name}\(\.\.\., scaler=scaler\)") as caught:
        steps(lambda loss: used.scale(loss), 6)  # LookSAM's fifth has two passes
    assert len(caught) == 1


@every
def test_bfloat16_needs_no_scaler(name):
    """All passes are in it, and what is perturbed, kept and trained is in float32."""
    half = Training(name, dtype=torch.float32, autocast=torch.bfloat16)
    single, computed = Training(name, dtype=torch.float32), []
    half.model[4].register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    half.step(8), single.step(8)
    assert half.passes == single.passes
    assert len(computed) >= half.passes
    assert set(computed) == {torch.bfloat16}
    assert half.optimizer.skipped_steps == 0
    state = half.state()
    for key, weight in single.state()["model"].items():
        torch.testing.assert_close(state["model"][key], weight, rtol=0.1, atol=0.1)
    kept = [t for entries in state["optimizer"]["flatmin"]["state"].values() for t in entries.values()]
    assert {tensor.dtype for tensor in (*half.model.parameters(), *kept)} == {torch.float32}


@pytest.mark.parametrize(("name", "steps", "number"), each_pass(names=TRAINED))
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_overflows_in_any_pass_is_dropped_whole_and_the_scale_goes_down(name, steps, number, value):
    """And it is not said, as this is how a scaler finds its scale: warnings are errors here."""
    training, twin = Training(name, scaler=scaler()), Training(name, scaler=scaler())
    training.step(steps), twin.step(steps)
    before = training.state()
    training.factor[training.passes + number] = value
    passes = training.passes
    training.step()
    assert training.passes == passes + number
    assert_same(training.state(), before)  # the statistics too, which have seen the batch
    assert training.optimizer.skipped_steps == 1
    assert training.scaler.get_scale() == 2.0**11
    training.step(3), twin.step(3)
    assert_same(training.state(), twin.state())


@every
def test_the_scale_is_found(name):
    """From one at which float16 overflows to one at which it does not, with no word."""
    training = Training(name, dtype=torch.float32, autocast=torch.float16, scaler=scaler(2.0**26))
    before = training.state()
    training.step(20)
    skipped = training.optimizer.skipped_steps
    assert 3 < skipped < 15
    assert training.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert training.optimizer.state_dict()["flatmin"]["step"] == 20 - skipped
    assert differ(before, training.state())


@every
def test_a_scaler_that_is_not_enabled_does_nothing(name):
    ours, plain = Training(name, scaler=GradScaler("cpu", enabled=False)), Training(name)
    assert ours.step(4) == plain.step(4)
    assert_same(ours.state(), plain.state())
    assert ours.optimizer.skipped_steps == 0


@closures
def test_micro_batches_are_scaled_and_summed(name):
    whole, parts = Training(name), Training(name, parts=3, scaler=scaler())
    for training in (whole, parts):
        training.model[1].eval()  # its statistics would be those of a part
        training.step(5)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@closures
def test_loops_without_a_closure_scale_too(name):
    ours, theirs = Training(name, scaler=scaler(growth_interval=2)), Training(name, scaler=scaler(growth_interval=2))
    for training in (ours, theirs):
        training.factor[5] = float("inf")
    ours.loop(5), theirs.step(5)
    assert_same(ours.state(), theirs.state())
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()
    assert ours.optimizer.skipped_steps == 1


def test_a_loss_that_was_never_scaled_is_refused_and_changes_nothing():
    training = Training("SAM", scaler=scaler())
    before = training.state()["model"]
    training.scaler, kept = None, training.scaler
    with pytest.raises(AssertionError, match=r"scaler\.scale"):
        training.step()
    assert kept.get_scale() == 2.0**12
    assert torch.equal(training.model[0].weight, before["0.weight"])


@pytest.mark.parametrize("wrong", [True, 1024, GradScaler])
def test_what_is_no_scaler_is_named(wrong):
    with pytest.raises(InvalidArgumentError, match=r"^scaler must be a torch\.amp\.GradScaler, got"):
        flatmin.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), scaler=wrong)
