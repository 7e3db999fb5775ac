"""One-pass methods in loops without a closure: what goes wrong, what is copied, and what is saved."""

import copy
import gc
import io
import weakref

import pytest
import torch

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, NonFiniteGradientWarning
from tests.contracts._one_pass import ONE_PASS, buffers, differ_now, losses, made, outside_scaler, plain, weights
from tests.contracts._optimizers import Training, assert_same

every = pytest.mark.parametrize("name", ONE_PASS)
STEPS = 4


# What goes wrong


@every
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_drops_the_step(name, parts):
    ours, theirs = made(name), made(name, parts=parts)
    plain(ours, parts), plain(ours, parts), theirs.step(2)
    before = ours.state()
    ours.optimizer.zero_grad()
    for loss in losses(ours, parts):
        (loss() * float("nan")).backward()
    with pytest.warns(NonFiniteGradientWarning):
        ours.optimizer.step()
    assert_same(ours.state(), before)  # running statistics, too
    assert ours.optimizer.step_dropped
    assert ours.optimizer.skipped_steps == 1
    plain(ours, parts), theirs.step()
    assert_same(ours.state(), theirs.state())


@every
@pytest.mark.parametrize("given", [False, True], ids=["outside", "given"])
def test_a_step_that_a_scaler_skips(name, given):
    ours, theirs = made(name), made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours.outside = scaler
    if given:
        ours.optimizer.scaler = scaler
    outside_scaler(ours, 1), outside_scaler(ours, 1), theirs.step(2)
    before = ours.state()
    for way in range(2 if given else 1):
        ours.optimizer.zero_grad()
        scaler.scale(losses(ours, 1)[0]() * float("inf")).backward()
        scaler.step(ours.optimizer) if way == 0 else ours.optimizer.step()
        scale = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == scale / 2
        ours.model.load_state_dict({**ours.model.state_dict(), **buffers(before)})  # torch's scaler tells nobody
        assert_same(ours.state(), before)
    outside_scaler(ours, 1), theirs.step()
    assert_same(ours.state(), theirs.state())


@every
def test_float16_with_an_outside_scaler_learns_what_float32_does(name):
    half, single = made(name, dtype=torch.float32, autocast=torch.float16), made(name, dtype=torch.float32)
    half.outside = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for _ in range(6):
        outside_scaler(half, 2), plain(single, 2)
    assert half.outside.get_scale() == 2.0**15
    for key, weight in single.state()["model"].items():
        torch.testing.assert_close(half.model.state_dict()[key], weight, rtol=0.05, atol=0.02)


@every
def test_without_model_it_says_what_to_do(name):
    training = Training(name)
    training.step(2)
    training.optimizer.zero_grad()
    losses(training, 1)[0]().backward()
    with pytest.raises(InvalidArgumentError, match="model="):
        training.optimizer.step()


@every
def test_a_closure_that_does_nothing_is_refused(name):
    training = Training(name)
    training.step(2)
    before = training.state()
    training.optimizer.zero_grad()
    losses(training, 1)[0]().backward()
    with pytest.raises(InvalidArgumentError, match=rf"left the gradients as they were.*{name}\(base, model=model\)"):
        training.optimizer.step(lambda: None)
    training.model.load_state_dict(before["model"])
    assert_same(training.state(), before)
    for clear in (True, False):  # and no right closure is
        training.optimizer.zero_grad(set_to_none=clear)
        training.step()


UNSEEN = {
    "a copy": lambda training: copy.deepcopy(training.model)(training.x).sum() + training.model[0].weight.sum(),
    "parts": lambda training: training.model[2:](training.model[1](training.model[0](training.x))).sum(),
    "evaluation mode": lambda training: training.model.eval()(training.x).sum(),
}


@pytest.mark.filterwarnings("ignore:.*update_bn")  # small weights, and an evaluation in between
@every
@pytest.mark.parametrize("how", UNSEEN)
def test_a_forward_that_is_not_seen_is_refused(name, how):
    training = made(name)
    plain(training, 1), plain(training, 1)
    for step in (training.optimizer.step, lambda: training.optimizer.step(lambda: None)):
        training.optimizer.zero_grad()
        UNSEEN[how](training).backward()
        before = weights(training)
        with pytest.raises(InvalidArgumentError, match=r"model= is to be the module that the loop calls"):
            step()
        assert_same(weights(training), before)


@every
def test_a_step_needs_a_gradient(name):
    training = made(name)
    plain(training, 1), plain(training, 1)
    training.optimizer.zero_grad()
    training.model(training.x)
    with pytest.raises(InvalidArgumentError, match=r"no gradient: call loss\.backward\(\)"):
        training.optimizer.step()


@every
def test_the_last_optimizer_of_the_same_parameters_counts(name):
    old = made(name)
    plain(old, 1), plain(old, 1)
    new, reference = made(name, model=old.model), made(name, model=copy.deepcopy(old.model))
    for _ in range(STEPS):
        plain(new, 1), reference.step()
    assert_same(new.state(), reference.state())
    losses(old, 1)[0]().backward()
    with pytest.raises(InvalidArgumentError, match="the last one made counts"):
        old.optimizer.step()


@every
def test_coarse_weights_are_warned_of(name):
    training = made(name, dtype=torch.bfloat16)
    training.optimizer.rho = 1e-4
    plain(training, 1)
    with pytest.warns(FlatminWarning, match=r"bfloat16"):
        plain(training, 2)
    plain(training, 2)


# Copies and checkpoints


def pickled(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@every
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_run_that_is_resumed_continues(name, when):
    whole, first = made(name), made(name)
    for _ in range(3):
        plain(whole, 2), plain(first, 2)
    clean, state = first.state()["model"], first.state()["optimizer"]
    if when == "within":  # a step over two micro-batches of which one has been: it is made again from its beginning
        losses(first, 2)[0]().backward()
        value = losses(first, 2)[1]()
        assert differ_now(first, weights(whole))
    model, state = pickled((first.model.state_dict(), first.optimizer.state_dict()))
    if when == "within":
        assert value.requires_grad
        model |= buffers({"model": clean})  # the statistics have moved
    assert_same(model, clean)
    second = made(name)
    second.model.load_state_dict(model), second.optimizer.load_state_dict(state)
    for _ in range(3):
        plain(whole, 2), plain(second, 2)
    assert_same(second.state(), whole.state())


@every
def test_loading_in_the_middle_begins_anew(name):
    training, other = made(name), made(name)
    plain(training, 1), plain(training, 1)
    saved = training.state()
    training.optimizer.perturb()
    training.optimizer.load_state_dict(saved["optimizer"])
    assert_same(training.state(), saved)
    value = losses(training, 1)[0]()
    training.model.load_state_dict(saved["model"])
    del value
    assert_same(training.state(), saved)
    plain(training, 1), other.step(3)
    assert_same(training.state(), other.state())


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_network_and_optimizer(name, copied):
    """Together they continue; of the network alone nothing is attached, and the original goes on."""
    training, whole = made(name), made(name)
    for _ in range(3):
        plain(training, 1), plain(whole, 1)
    alone = copied(training.model)
    model, optimizer = copied((training.model, training.optimizer))
    twin = made(name)
    twin.model = twin.forward = model
    twin.optimizer = optimizer
    hooks = [n for n, v in vars(alone).items() if n.endswith(("_hooks", "_called")) and v]
    assert not hooks
    assert "__getstate__" not in vars(alone)
    before = copy.deepcopy(list(alone.parameters()))
    value = alone.train()(training.x)
    assert value.requires_grad
    assert_same(list(alone.parameters()), before)
    assert_same(weights(training), before)
    plain(twin, 1), plain(training, 1), whole.step()
    assert_same(twin.state(), whole.state())
    assert_same(training.state(), whole.state())


@every
def test_an_average_takes_the_clean_weights_and_nothing_that_is_attached(name):
    training = made(name)
    plain(training, 1), plain(training, 1)
    clean = weights(training)
    value = losses(training, 1)[0]()
    assert differ_now(training, clean)
    average = flatmin.EMA(training.model)  # without a warning
    assert_same([parameter.detach() for parameter in average.module.parameters()], clean)
    with pytest.raises(InvalidArgumentError, match=r"put back: the network was copied; do that before the forward"):
        value.backward()


@every
def test_nothing_is_kept_alive(name):
    training = made(name)
    plain(training, 1), plain(training, 1)
    references = weakref.ref(training.model), weakref.ref(training.optimizer)
    training.model(training.x)
    del training
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@every
def test_an_optimizer_that_is_gone_leaves_the_weights_clean(name):
    training = made(name)
    plain(training, 1), plain(training, 1)
    clean = weights(training)
    value = losses(training, 1)[0]()
    assert differ_now(training, clean)
    training.optimizer = None
    gc.collect()
    assert_same(weights(training), clean)
    del value
    training.model(training.x)
    assert_same(weights(training), clean)
