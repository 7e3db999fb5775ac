"""Steps without a closure: a loop over the passes, or first_step and second_step."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim import Every
from tests.contracts._optimizers import CLOSED, CLOSURES, TRAINED, Training, assert_same, differ, passes_of

closures = pytest.mark.parametrize("name", CLOSED)


def two_steps(training: Training, count: int) -> None:
    """The loop that is written for optimizers with two steps."""
    for _ in range(count):
        if TRAINED[type(training.optimizer).__name__].max_passes == 2:
            training.closure()
        if training.optimizer.first_step():
            training.closure()
            training.optimizer.second_step()
        training.update()


@closures
@pytest.mark.parametrize("loop", [Training.loop, two_steps])
def test_it_equals_the_closure_to_the_bit(name, loop):
    ours, theirs = Training(name), Training(name)
    loop(ours, 5), theirs.step(5)
    assert_same(ours.state(), theirs.state())
    assert ours.passes == theirs.passes


@pytest.mark.parametrize("loop", [Training.loop, two_steps])
def test_steps_that_do_not_pay_have_one_pass(loop):
    ours, theirs = Training("SAM", when=Every(3)), Training("SAM", when=Every(3))
    loop(ours, 6), theirs.step(6)
    assert ours.passes == theirs.passes == 8
    assert_same(ours.state(), theirs.state())


@closures
@pytest.mark.parametrize("loop", [Training.loop, two_steps])
def test_a_pass_that_is_not_finite_drops_the_step(name, loop):
    training = Training(name)
    training.step(2)
    before = training.state()
    training.factor[training.passes + 1] = float("nan")
    with pytest.warns(flatmin.errors.NonFiniteGradientWarning):
        loop(training, 1)
    assert_same(training.state()["optimizer"], before["optimizer"])
    assert training.optimizer.skipped_steps == 1
    loop(training, 1)
    assert differ(before, training.state())


ALWAYS_TWO = ["SAM", "ASAM", "GSAM", "FriendlySAM"]


def davda54(training: Training, count: int) -> None:
    """The loop of davda54/sam's README, which pytorch-optimizer's has too: it asks nothing and clears by itself."""
    model, optimizer = training.model, training.optimizer
    for _ in range(count):
        for input, output in [(training.x, training.y)]:
            # first forward-backward pass
            loss = F.cross_entropy(model(input), output)  # use this loss for any training statistics
            loss.backward()
            optimizer.first_step(zero_grad=True)
            # second forward-backward pass
            F.cross_entropy(model(input), output).backward()  # make sure to do a full forward pass
            optimizer.second_step(zero_grad=True)


@closures
def test_the_loop_for_other_libraries_equals_the_closure_with_batch_norm(name):
    ours, theirs = Training(name), Training(name)
    if name not in ALWAYS_TWO:  # the loop makes passes that nobody wants, which move the statistics
        ours.model[1].eval(), theirs.model[1].eval()
    davda54(ours, 5), theirs.step(5)
    assert_same(ours.state(), theirs.state())
    assert theirs.model[1].num_batches_tracked == (5 if name in ALWAYS_TWO else 0)
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_that_loop_drops_a_step_whose_first_pass_is_not_finite():
    training, twin = Training("SAM"), Training("SAM")
    training.model[1].eval(), twin.model[1].eval()
    davda54(training, 2), davda54(twin, 2)
    training.x, x = training.x * float("nan"), training.x
    with pytest.warns(flatmin.errors.NonFiniteGradientWarning):
        davda54(training, 1)
    training.x = x
    assert training.optimizer.skipped_steps == 1
    davda54(training, 3), davda54(twin, 3)
    assert_same(training.state(), twin.state())


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("zero_grad", [True, False])
def test_zero_grad_clears_after_either_step_and_nothing_is_cleared_without_it(name, runs, zero_grad):
    two = TRAINED[name].max_passes == 2
    training = Training(name, **({"when": lambda step: runs} if two else {}))
    training.closure()
    wanted = training.optimizer.first_step(zero_grad=zero_grad)
    assert wanted == (runs or not two)
    cleared = [parameter.grad is None for parameter in training.model.parameters()]
    assert cleared == [zero_grad or (two and wanted)] * len(cleared)
    training.closure()
    training.optimizer.second_step(zero_grad=zero_grad)
    cleared = [parameter.grad is None for parameter in training.model.parameters()]
    assert cleared == [zero_grad] * len(cleared)


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("how", ["break", "raise", "close"])
def test_a_step_given_up_leaves_no_trace(name, how):
    training = Training(name)
    training.model[1].eval()  # the statistics have seen the batch in any case
    training.step(2)
    before, last, moved = training.state(), passes_of(name, 2), []
    training.each_pass = lambda: moved.append(training.model[0].weight.detach().clone())
    gc.disable()  # it is not for the collector to find
    try:
        if how == "close":
            passes = training.optimizer.passes()
            for _ in range(last):
                next(passes)
                training.closure()
            passes.close()
        else:
            for number in training.optimizer.passes():
                training.closure()
                if number == last - 1:
                    if how == "break":
                        break
                    raise ValueError("in the loop")
    except ValueError:
        pass
    finally:
        gc.enable()
    assert_same(training.state(), before)
    assert len(moved) == last
    assert torch.equal(moved[-1], before["model"]["0.weight"]) == (name == "LookSAM" and last == 1)
    training.step()
    assert differ(before, training.state())


@closures
def test_first_step_can_be_abandoned(name):
    training = Training(name)
    training.step(4)
    before = training.state()["optimizer"]
    weights = copy.deepcopy(list(training.model.parameters()))
    training.closure()
    assert training.optimizer.first_step()
    assert any(not torch.equal(a, b) for a, b in zip(weights, training.model.parameters(), strict=True))
    training.optimizer.abandon()
    training.optimizer.abandon()
    assert all(torch.equal(a, b) for a, b in zip(weights, training.model.parameters(), strict=True))
    assert_same(training.optimizer.state_dict(), before)
    assert not nn.modules.module._global_forward_pre_hooks


def test_nothing_else_is_done_while_a_step_is_under_way():
    training = Training("SAM")
    training.step()
    state = training.optimizer.state_dict()
    training.closure()
    training.optimizer.first_step()
    for call in (
        training.optimizer.first_step,
        training.optimizer.state_dict,
        lambda: training.optimizer.load_state_dict(state),
        training.step,
        training.loop,
        lambda: copy.deepcopy(training.optimizer),
    ):
        with pytest.raises(InvalidArgumentError, match=r"while a step is under way.*second_step.*abandon"):
            call()
    training.closure()
    training.optimizer.second_step()
    training.step()


def test_a_step_that_a_hook_stops_is_not_made_later():
    training = Training("SAM")

    def stop(*_):
        raise ValueError("in the hook")

    handle = training.optimizer.register_step_pre_hook(stop)
    with pytest.raises(ValueError, match="in the hook"):
        training.loop()
    handle.remove()
    with pytest.raises(InvalidArgumentError, match="step needs a closure"):
        training.optimizer.step()
    training.loop()
    assert training.optimizer.state_dict()["flatmin"]["step"] == 1


def test_second_step_comes_after_first_step():
    training = Training("SAM", when=lambda step: step > 0)
    with pytest.raises(InvalidArgumentError, match="second_step comes after first_step"):
        training.optimizer.second_step()
    training.closure()
    assert not training.optimizer.first_step()
    training.optimizer.second_step()  # as loops do that do not ask
    assert training.optimizer.state_dict()["flatmin"]["step"] == 1
    with pytest.raises(InvalidArgumentError, match="second_step comes after first_step"):
        training.optimizer.second_step()


@closures
def test_schedulers_and_hooks_see_each_step_once(name):
    training, fired = Training(name), []
    scheduler = StepLR(training.optimizer, 1, gamma=0.5)
    for which in (training.optimizer, training.optimizer.base_optimizer):
        which.register_step_pre_hook(lambda *_: fired.append("pre"))
        which.register_step_post_hook(lambda *_: fired.append("post"))
    training.loop()
    scheduler.step()  # which warns of a step that it has not seen
    assert fired == ["pre", "pre", "post", "post"]
    two_steps(training, 1)
    assert fired == ["pre", "pre", "post", "post"] * 2
    assert training.optimizer.param_groups[0]["lr"] == 0.05


@closures
def test_step_without_a_closure_says_how(name):
    with pytest.raises(InvalidArgumentError, match=r"def closure.*optimizer\.passes\(\).*first_step, second_step"):
        Training(name).optimizer.step()


def test_a_pass_without_a_gradient_is_explained_and_gives_the_step_up():
    training = Training("SAM")
    before = training.state()
    with pytest.raises(InvalidArgumentError, match=r"left no gradient.*backward"):
        for _ in training.optimizer.passes():
            training.optimizer.zero_grad()
    assert_same(training.state(), before)


@pytest.mark.parametrize("call", [lambda o: o.first_step(), lambda o: next(o.passes()), lambda o: o.step()])
def test_esam_says_what_it_wants(call):
    with pytest.raises(InvalidArgumentError, match=r"closure.*def losses\(keep\)"):
        call(Training("ESAM").optimizer)
