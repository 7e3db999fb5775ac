"""perturb, restore and step without a closure: a step whose passes are made in somebody else's loop."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim import Adaptive, Every, Late, RhoByLR, Sometimes
from tests.contracts._optimizers import CLOSURES, EVERY, VISIBLE, Training, assert_same, network, sgd
from tests.optim._problem import TRAINED, Problem
from tests.optim.test_family import Oracle, make

TWO = [name for name in CLOSURES if EVERY[name].max_passes == 2]
two = pytest.mark.parametrize("name", TWO)
ORDER = r"backward\(\), perturb\(\), backward\(\), restore\(\), step\(\)"


def perturbed(training: Training, count: int = 1) -> None:
    """The loop that is asked about, for the methods that have two passes."""
    for _ in range(count):
        training.closure()
        if training.optimizer.perturb():
            training.closure()
            training.optimizer.restore()
        training.optimizer.step()
        training.update()


@two
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 5, 2)])
def test_it_equals_the_rule_by_hand_over_micro_batches(name, sizes):
    """In float64: SGD with momentum, stepping with the oracle's gradient of the whole batch."""
    problem, oracle = Problem(), Oracle(name)
    optimizer = make(name, problem.sgd(weight_decay=0.01))
    weights = [problem.model.get_parameter(n).detach().clone() for n in TRAINED]
    velocities = [torch.zeros_like(weight) for weight in weights]

    def passes() -> None:
        optimizer.zero_grad()
        for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True):
            (F.cross_entropy(problem.model(x), y) * len(x) / 12).backward()

    for _ in range(7):
        gradients = oracle(weights, problem.gradient(TRAINED), velocities)
        for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
            velocity.mul_(0.9).add_(gradient + 0.01 * weight)
            weight.sub_(0.1 * velocity)
        passes()
        if optimizer.perturb():
            passes()
            optimizer.restore()
        optimizer.step()
        for n, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(n).detach(), weight, rtol=1e-9, atol=1e-11)


WHENS = {
    "always": dict,
    "every": lambda: {"when": Every(2)},
    "late": lambda: {"when": Late(0.4, 6)},
    "sometimes": lambda: {"when": Sometimes(0.5)},
    "adaptive": lambda: {"when": Adaptive(6, start=0.3, end=-0.3)},
    "function": lambda: {"when": lambda step: step != 1},
    "rho": lambda: {"rho": RhoByLR(0.3, 0.0, lr_max=0.1)},
    "clipped": lambda: {"max_norm": 0.1},
}


@two
@pytest.mark.parametrize(("when", "given"), [(when, index % 2 == 0) for index, when in enumerate(WHENS)])
def test_it_equals_the_closure_to_the_bit_with_every_schedule(name, when, given):
    ours, theirs = (scheduled(name, given, **WHENS[when]()) for _ in range(2))
    for step in range(6):
        for training in (ours, theirs):
            training.optimizer.param_groups[0]["lr"] = 0.0 if step == 2 else 0.1
        perturbed(ours), theirs.step()
    assert_same(ours.state(), theirs.state())
    assert ours.passes == theirs.passes


def scheduled(name: str, given: bool, rho: object = None, **options: object) -> Training:
    training = Training(name, given=given, **options)
    if rho is not None:
        training.optimizer.rho = rho
    return training


@two
def test_restore_leaves_what_the_base_steps_with_and_the_weights_as_they_were(name):
    training, base = Training(name), Training(name)
    training.step(2)
    base.model.load_state_dict(training.model.state_dict())
    plain = torch.optim.SGD(base.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    plain.load_state_dict(copy.deepcopy({k: v for k, v in training.optimizer.state_dict().items() if k != "flatmin"}))
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.closure()
    if training.optimizer.perturb():
        assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
        training.closure()
        training.optimizer.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    for ours, theirs in zip(training.model.parameters(), base.model.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    training.optimizer.step(), plain.step()
    assert_same(list(training.model.parameters()), list(base.model.parameters()))


# --- wrong orders


@two
def test_wrong_orders_name_the_right_one_and_change_nothing(name):
    training = Training(name)
    training.step(4)
    optimizer, state = training.optimizer, training.optimizer.state_dict()
    with pytest.raises(InvalidArgumentError, match=f"restore comes after perturb, which has not been called.*{ORDER}"):
        optimizer.restore()
    optimizer.zero_grad()
    with pytest.raises(InvalidArgumentError, match=r"first pass left no gradient: call backward\(\) before perturb"):
        optimizer.perturb()
    training.closure()
    before = copy.deepcopy(training.model.state_dict())
    assert optimizer.perturb()
    moved = copy.deepcopy(training.model.state_dict())
    for call in (
        optimizer.perturb,
        optimizer.step,
        lambda: optimizer.step(training.closure),
        lambda: next(optimizer.passes()),
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(state),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(InvalidArgumentError, match=rf"while a step is under way.*{ORDER}.*abandon\(\)"):
            call()
        assert_same(training.model.state_dict(), moved)
    optimizer.zero_grad()
    with pytest.raises(InvalidArgumentError, match=r"second pass left no gradient: .* again before restore"):
        optimizer.restore()
    assert_same(training.model.state_dict(), before)
    assert_same(optimizer.state_dict(), state)
    with pytest.raises(InvalidArgumentError, match=r"step needs a closure.*perturb, restore and step"):
        optimizer.step()
    training.step()


def test_restore_is_refused_where_no_second_pass_was_wanted():
    training = Training("SAM", when=Every(2))
    training.step()
    training.closure()
    assert not training.optimizer.perturb()
    with pytest.raises(InvalidArgumentError, match=r"only where it returns True: if optimizer\.perturb\(\)"):
        training.optimizer.restore()
    training.optimizer.step()
    assert training.optimizer.state_dict()["flatmin"]["step"] == 2


@two
def test_an_exception_in_the_second_pass_has_a_way_out(name):
    training, twin = Training(name, given=True), Training(name, given=True)
    training.step(4), twin.step(4)
    before = training.state()
    training.closure()
    assert training.optimizer.perturb()
    training.raises = training.passes + 1
    with pytest.raises(RuntimeError, match="in the closure"):
        training.closure()
    training.optimizer.abandon()
    assert_same(training.optimizer.state_dict(), before["optimizer"])
    assert_same([p.detach() for p in training.model.parameters()], [p.detach() for p in twin.model.parameters()])
    training.model.load_state_dict(before["model"])  # the statistics have seen the batch
    perturbed(training, 2), twin.step(2)
    assert_same(training.state(), twin.state())


@two
def test_a_prepared_step_may_be_saved_and_left_out(name):
    """State and memory are those of before until the step is made."""
    training, twin = Training(name, given=True), Training(name, given=True)
    training.step(3), twin.step(3)
    before = training.state()
    training.closure()
    if training.optimizer.perturb():
        training.closure()
        training.optimizer.restore()
    assert_same(training.optimizer.state_dict(), before["optimizer"])
    copy.deepcopy(training.optimizer)
    training.optimizer.abandon()
    training.model.load_state_dict(before["model"])
    training.step(3), twin.step(3)
    assert_same(training.state(), twin.state())


@two
def test_a_step_that_was_prepared_and_never_made_is_said_once(name):
    training = Training(name)
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                training.closure()
                if training.optimizer.perturb():
                    training.closure()
                    training.optimizer.restore()
        assert [f"a step of {name} was prepared" in str(w.message) for w in caught] == [True] * expected
        assert all(w.category is FlatminWarning and w.filename == __file__ for w in caught)


@two
def test_a_gradient_that_is_cleared_before_step_is_noticed(name):
    training = Training(name)
    training.closure()
    if training.optimizer.perturb():
        training.closure()
        training.optimizer.restore()
    training.optimizer.zero_grad()
    with pytest.raises(InvalidArgumentError, match=r"was cleared: call zero_grad\(\) after step"):
        training.optimizer.step()
    perturbed(training)


@two
def test_a_closure_that_computes_nothing_may_come_with_a_prepared_step(name):
    """As Lightning gives one to every step; one that computes would replace what was prepared."""
    training, twin = Training(name), Training(name)
    for _ in range(3):
        training.closure()
        if training.optimizer.perturb():
            training.closure()
            training.optimizer.restore()
        training.optimizer.step(lambda: None)
    perturbed(twin, 3)
    assert_same(training.state(), twin.state())
    training.closure()
    if training.optimizer.perturb():
        training.closure()
        training.optimizer.restore()
    with pytest.raises(InvalidArgumentError, match=r"had prepared the step.*call step\(\) without a closure"):
        training.optimizer.step(training.closure)


def test_esam_and_several_ranks_gradients_are_refused():
    training = Training("ESAM")
    training.model(training.x).sum().backward()
    with pytest.raises(InvalidArgumentError, match=r"ESAM makes its passes itself.*give step a closure"):
        training.optimizer.perturb()
    training.step()


# --- gradients that are not finite


@two
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_that_is_not_finite_drops_the_step(name, given, number, steps):
    """With ``model=`` in the first step of all too; it puts back statistics, which have seen the batch."""
    training, twin = Training(name, given=given), Training(name, given=given)
    perturbed(training, steps), perturbed(twin, steps)
    if number == 2 and name == "LookSAM" and steps == 3:
        return  # which has one pass then
    clean, infinite = training.x, training.x.clone()
    infinite[:, 0] = float("inf")
    for index in range(1, number + 1):
        training.x = infinite if index == number else clean
        training.closure()
        if index == 1:
            assert training.optimizer.perturb() == (number == 2)
    if number == 2:
        training.optimizer.restore()
    training.x = clean
    assert training.optimizer.step_dropped
    assert training.optimizer.skipped_steps == 1
    with pytest.warns(NonFiniteGradientWarning, match="first" if number == 1 else "second"):
        training.optimizer.step()
    assert training.optimizer.skipped_steps == 1
    if given or steps or number == 2:
        assert_same(training.state()["optimizer"], twin.state()["optimizer"])
        if given or steps:
            assert_same(training.state(), twin.state())
            perturbed(training, 3), perturbed(twin, 3)
            assert_same(training.state(), twin.state())


# --- what stands still in the second pass


@two
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("way", ["perturb", "first_step"])
def test_each_micro_batch_has_the_mask_of_the_first_pass(name, parts, way):
    """With ``model=``, even if somebody draws between the micro-batches of the first pass."""
    training = Training(name, network(dropout=0.5), parts=parts, given=True)
    masks, noise = [], [True]
    training.model[3].register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    training.model.register_forward_hook(lambda *_: torch.rand(3).sum().mul(0).item() or None if noise[0] else None)
    torch.manual_seed(3)
    for _ in range(4):
        masks.clear()
        noise[0] = True
        training.closure()
        after = torch.get_rng_state()
        noise[0] = False
        wanted = getattr(training.optimizer, way)()
        if wanted:
            training.closure()
            assert len(masks) == 2 * parts
            assert all(torch.equal(a, b) for a, b in zip(masks[:parts], masks[parts:], strict=True))
            training.optimizer.restore() if way == "perturb" else training.optimizer.second_step()
        if way == "perturb":
            training.optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
    assert wanted or name == "LookSAM"


def test_by_choice_the_masks_differ_and_none_is_kept():
    training, masks = Training("SAM", network(dropout=0.5), given=True, same_randomness=False), []
    training.model[3].register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    perturbed(training)
    assert not torch.equal(*masks)


@two
@pytest.mark.parametrize("given", [False, True])
def test_statistics_count_each_batch_once(name, given):
    training = Training(name, given=given, parts=3)
    perturbed(training, 4)
    assert training.model[1].num_batches_tracked == 12


@two
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("start", [None, 2.0])
def test_another_optimizer_gets_the_gradient_of_the_second_pass_alone(name, given, clears, start):
    """Whether or not the loop clears it in between; one that the loss does not reach keeps its own."""
    body, head, apart = network(), nn.Linear(3, 3).double(), nn.Parameter(torch.ones(2))
    training, seen = Training(name, body, given=given), []
    others = [torch.optim.SGD(head.parameters(), lr=0.0), torch.optim.SGD([apart], lr=0.0)]
    training.forward = lambda x: head(body(x))
    head.weight.register_hook(seen.append)
    for _ in range(3):
        others[0].zero_grad()
        apart.grad = None if start is None else torch.full_like(apart, start)
        seen.clear()
        training.closure()
        wanted = training.optimizer.perturb()
        if wanted:
            if clears:
                others[0].zero_grad()
            training.closure()
            training.optimizer.restore()
        training.optimizer.step()
        assert len(seen) == 1 + wanted
        assert torch.equal(head.weight.grad, seen[-1])
        assert apart.grad is None if start is None else torch.equal(apart.grad, torch.full_like(apart, start))


def test_a_step_given_up_puts_other_gradients_back():
    body, head = network(), nn.Linear(3, 3).double()
    training, other = Training("SAM", body), torch.optim.SGD(head.parameters(), lr=0.0)
    training.forward = lambda x: head(body(x))
    training.closure()
    first = head.weight.grad.clone()
    assert training.optimizer.perturb()
    training.closure()
    training.optimizer.abandon()
    assert torch.equal(head.weight.grad, first)
    assert other.param_groups


@two
@pytest.mark.parametrize("how", ["outer", "in place", "function"])
def test_a_compiled_network_is_seen_as_far_as_it_can_be(name, how):
    torch._dynamo.reset()
    model = network().double()
    given = torch.compile(model, backend="eager") if how == "outer" else model
    if how == "in place":
        model.compile(backend="eager")
    training = Training(name, model)
    training.optimizer = EVERY[name](sgd(model), rho=0.3, model=given, **VISIBLE.get(name, {}))
    training.forward = torch.compile(lambda x: model(x), backend="eager") if how == "function" else given
    plain = Training(name)
    perturbed(training, 3), perturbed(plain, 3)
    assert training.model[1].num_batches_tracked == 3
    for a, b in zip(training.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_hook_belongs_to_this_network_and_optimizer_alone():
    """Copies of the network have none that acts, and it goes with the optimizer."""
    training = Training("SAM", given=True)
    twin = copy.deepcopy(training.model)
    average = flatmin.EMA(training.model, decay=0.9)  # which warns of foreign hooks
    assert not average.module._forward_pre_hooks
    training.closure()
    kept = len(training.optimizer._beginnings._next.random)
    twin(training.x).sum().backward()
    with torch.no_grad():
        training.model(training.x)
    training.model.eval()(training.x)
    assert len(training.optimizer._beginnings._next.random) == kept == 1
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    model.train()(training.x).sum().backward()
    assert len(optimizer._beginnings._next.random) == 1
    assert len(training.optimizer._beginnings._next.random) == 1
    hooks = training.model._forward_pre_hooks
    assert len(hooks) == 1
    del training.optimizer
    assert not hooks


def test_a_closure_keeps_nothing_for_a_first_pass_that_is_not_known():
    training = Training("SAM", given=True)
    training.step(2)
    assert not training.optimizer._beginnings._next.seen


def test_functional_calls_are_passes_too():
    training = Training("SAM", given=True)
    weights = dict(training.model.named_parameters())
    training.forward = lambda x: functional_call(training.model, weights, (x,))
    plain = Training("SAM")
    perturbed(training, 3), perturbed(plain, 3)
    assert_same(training.state(), plain.state())
