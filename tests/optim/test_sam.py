"""SAM against its oracle, and each promise of `SharpnessAware`."""

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim._foreach import global_norm
from tests.optim._problem import TRAINED, C, Problem, assert_same
from tests.reference import oracles


def assert_shares(sam: flatmin.SAM) -> None:
    assert sam.param_groups is sam.base_optimizer.param_groups
    assert sam.state is sam.base_optimizer.state
    assert sam.defaults is sam.base_optimizer.defaults


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_sgd_equals_the_oracle_over_several_groups(rho):
    problem = Problem()
    parameters = dict(problem.model.named_parameters())
    head = [parameters.pop("head.weight"), parameters.pop("head.bias")]
    groups = [{"params": list(parameters.values())}, {"params": head, "lr": 0.3, "weight_decay": 0.0}]
    sam = flatmin.SAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01), rho=rho)
    weights = [dict(problem.model.named_parameters())[name].detach().clone() for name in TRAINED]
    velocities = [torch.zeros_like(weight) for weight in weights]
    untouched = copy.deepcopy([problem.model.head.bias, problem.model.unused])
    for _ in range(6):
        problem.steps(sam)
        gradient, _ = oracles.sam_gradient(weights, problem.gradient(TRAINED), rho)
        weights, velocities = oracles.sgd(
            weights, velocities, gradient, lr=[0.1] * 3 + [0.3], momentum=0.9, weight_decay=[0.01] * 3 + [0.0]
        )
        for name, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(name).data, weight, rtol=1e-10, atol=1e-12)
    assert torch.equal(problem.model.head.bias, untouched[0])
    assert torch.equal(problem.model.unused, untouched[1])


def test_adamw_equals_torchs_own_fed_with_the_oracles_gradient():
    problem, rho = Problem(), 0.5
    sam = flatmin.SAM(torch.optim.AdamW(problem.model.parameters(), lr=0.01, weight_decay=0.1), rho=rho)
    weights = [problem.model.get_parameter(name).detach().clone().requires_grad_() for name in TRAINED]
    reference = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    for _ in range(6):
        problem.steps(sam)
        gradients, _ = oracles.sam_gradient([w.detach() for w in weights], problem.gradient(TRAINED), rho)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        reference.step()
        for name, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(name).data, weight.data, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rho", [0.01, 1.0, 100.0])
def test_second_call_is_rho_up_the_slope_from_the_first(rho):
    problem = Problem()
    loss = problem.steps(sam := flatmin.SAM(problem.sgd(), rho=rho))
    first, second = problem.calls
    moved = torch.cat([(second[name] - first[name]).flatten() for name in first])
    assert moved.norm().item() == pytest.approx(rho, rel=1e-9)
    gradient = problem.gradient(TRAINED)([first[name] for name in TRAINED])
    along = sum((second[n] - first[n]).mul(g).sum() for n, g in zip(TRAINED, gradient, strict=True))
    assert along.item() == pytest.approx(rho * float(global_norm(gradient)), rel=1e-9)  # parallel, and uphill
    assert torch.equal(loss[0], problem.losses[0])
    assert problem.losses[0] != problem.losses[1]
    assert sam.skipped_steps == 0


def test_update_differs_from_the_base_optimizers():
    ours, plain = Problem(), Problem()
    ours.steps(flatmin.SAM(ours.sgd(), rho=0.5))
    plain.steps(plain.sgd())
    difference = ours.model.head.weight - plain.model.head.weight
    assert difference.norm() > 0.01 * (ours.calls[0]["head.weight"] - plain.model.head.weight).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_are_restored_bitwise_before_the_base_steps(dtype):
    problem = Problem(dtype=dtype)
    base = problem.sgd()
    seen = []
    base.register_step_pre_hook(lambda *_: seen.append(copy.deepcopy(problem.model.state_dict())))
    problem.steps(flatmin.SAM(base, rho=3.0), 3)
    assert len(problem.calls) == 2 * len(seen) == 6
    for step, weights in enumerate(seen):
        assert all(torch.equal(weights[name], value) for name, value in problem.calls[2 * step].items())
        assert not torch.equal(weights["head.weight"], problem.calls[2 * step + 1]["head.weight"])


@pytest.mark.parametrize("call", [1, 2])
def test_weights_are_restored_when_the_closure_raises(call):
    problem = Problem()
    sam = flatmin.SAM(problem.sgd(), rho=3.0)
    problem.steps(sam, 2)
    before = problem.state(sam)
    problem.raises = 4 + call
    with pytest.raises(ValueError, match="in the closure"):
        problem.steps(sam)
    assert len(problem.calls) == 4 + call
    assert_same(problem.state(sam), before)


def test_works_under_no_grad_as_torchs_own():
    problem, other = Problem(), Problem()
    with torch.no_grad():
        inside = problem.steps(flatmin.SAM(problem.sgd()), 2)
    assert torch.equal(inside, other.steps(flatmin.SAM(other.sgd()), 2))


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True, affine=True), nn.Flatten()
    ),
    "applied twice": lambda: nn.Sequential(norm := nn.BatchNorm1d(8), nn.ReLU(), norm),
    "frozen": lambda: nn.BatchNorm1d(8).eval(),
    "without statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
}


def normalised(norm: str) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), NORMS[norm](), nn.Linear(8, C))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize("how", ["hook", "model", "compiled", "compiled, hook", "compiled in place, hook"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "raises"])
def test_statistics_are_those_of_the_first_pass(norm, how, fails):
    problem = Problem(normalised(norm), dtype=torch.float32)
    eager, twin = problem.model, copy.deepcopy(problem.model)
    if how == "compiled in place, hook":
        problem.model.compile(backend="eager")
    elif how.startswith("compiled"):
        problem.model = torch.compile(problem.model, backend="eager")
    sam = flatmin.SAM(problem.sgd(), rho=5.0, model=None if how.endswith("hook") else problem.model)
    for step in range(2):
        twin.load_state_dict(eager.state_dict())
        twin(problem.x)
        problem.raises = 2 * step + 2 if fails else None
        with pytest.raises(ValueError, match="closure") if fails else contextlib.nullcontext():
            problem.steps(sam)
        assert dict(eager.named_buffers()).keys() == dict(twin.named_buffers()).keys()
        for (name, buffer), expected in zip(eager.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, expected), name
    if norm == "batch norm":
        assert eager[1].num_batches_tracked == 2
        assert eager[1].momentum == 0.1


@pytest.mark.parametrize("raises", [None, 1, 2])
def test_hooks_do_not_leak(raises):
    problem = Problem(normalised("batch norm"))
    problem.raises = raises
    with contextlib.suppress(ValueError):
        problem.steps(flatmin.SAM(problem.sgd()))
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_with_a_gradient_that_is_not_finite_is_dropped_and_said_once(call, value):
    problem = Problem()
    sam = flatmin.SAM(problem.sgd(), rho=3.0)
    problem.steps(sam, 2)
    before = problem.state(sam)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dropped in range(1, 4):
            done = len(problem.calls)
            problem.factor[done + call] = value
            loss = problem.steps(sam)[0]
            assert sam.skipped_steps == dropped
            assert len(problem.calls) == done + call
            assert torch.equal(loss, problem.losses[done]) or call == 1
            assert_same(problem.state(sam), before)
    assert [warning.category for warning in caught] == [NonFiniteGradientWarning]
    assert caught[0].filename.endswith("_problem.py")  # where step is called
    assert ["first", "second"][call - 1] in str(caught[0].message)
    problem.steps(sam)
    assert problem.state(sam)["model"]["head.weight"].isfinite().all()
    assert not torch.equal(problem.model.head.weight, before["model"]["head.weight"])


SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, gamma=0.1),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=9),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("on_base", [False, True], ids=["on SAM", "on the base"])
def test_schedulers_act_on_the_base(name, on_base):
    seen = []
    for make in (lambda base: base, flatmin.SAM):
        problem, rates = Problem(), []
        base = problem.sgd()
        optimizer = make(base)
        scheduler = SCHEDULERS[name](base if on_base else optimizer)
        base.register_step_pre_hook(
            lambda base, *_, rates=rates: rates.append([(g["lr"], g["momentum"]) for g in base.param_groups])
        )
        for _ in range(8):
            problem.steps(optimizer)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        seen.append(rates)
    assert seen[0] == seen[1]
    assert len({str(rate) for rate in seen[0]}) > 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears(set_to_none):
    problem = Problem()
    problem.steps(sam := flatmin.SAM(problem.sgd()))
    sam.zero_grad(set_to_none=set_to_none)
    left = [p.grad for p in problem.model.parameters() if p.grad is not None]
    assert left == [] if set_to_none else all((gradient == 0).all() for gradient in left)


def test_step_hooks_fire_once_a_step():
    problem, fired = Problem(), []
    base = problem.sgd()
    sam = flatmin.SAM(base)
    for name, optimizer in (("sam", sam), ("base", base)):
        optimizer.register_step_pre_hook(lambda *_, name=name: fired.append(f"{name} pre"))
        optimizer.register_step_post_hook(lambda *_, name=name: fired.append(f"{name} post"))
    problem.steps(sam, 2)
    assert fired == ["sam pre", "base pre", "base post", "sam post"] * 2


@pytest.mark.parametrize("on_base", [False, True], ids=["on SAM", "on the base"])
def test_added_group_takes_part(on_base):
    problem = Problem()
    groups = [list(problem.model.first.parameters()), list(problem.model.head.parameters())]
    sam = flatmin.SAM(torch.optim.SGD(groups[0], lr=0.1), rho=1.0)
    (sam.base_optimizer if on_base else sam).add_param_group({"params": groups[1], "lr": 0.5})
    assert_shares(sam)
    assert [group["lr"] for group in sam.param_groups] == [0.1, 0.5]
    problem.steps(sam)
    moved = sum((problem.calls[1][n] - problem.calls[0][n]).square().sum() for n in problem.calls[0])
    assert moved.sqrt().item() == pytest.approx(1.0)
    assert not torch.equal(problem.calls[0]["head.weight"], problem.calls[1]["head.weight"])
    assert not torch.equal(problem.calls[0]["head.weight"], problem.model.head.weight)


def test_resume_is_bitwise_neutral():
    problem = Problem()
    sam = flatmin.SAM(problem.sgd(), rho=0.5)
    problem.steps(sam, 3)
    file = io.BytesIO()
    torch.save(problem.state(sam), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert len(saved["optimizer"]["state"]) == len(TRAINED)  # momentum
    resumed = Problem()
    resumed.model.load_state_dict(saved["model"])
    other = flatmin.SAM(resumed.sgd(lr=7.0), rho=0.5)
    other.load_state_dict(saved["optimizer"])
    assert_shares(other)
    assert torch.equal(problem.steps(sam, 3), resumed.steps(other, 3))
    assert_same(problem.state(sam), resumed.state(other))


def test_plain_checkpoint_loads_and_schedulers_still_act():
    plain = Problem()
    plain.steps(base := plain.sgd(), 3)
    problem = Problem()
    sam = flatmin.SAM(problem.sgd(lr=7.0))
    sam.load_state_dict(base.state_dict())
    assert_same({**base.state_dict(), "flatmin": {"step": 0, "state": {}, "when": {}}}, sam.state_dict())
    StepLR(sam, 1, gamma=0.5)
    sam.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(problem.model.state_dict())
    problem.steps(sam)
    assert_same(problem.model.state_dict(), before)


@pytest.mark.parametrize("duplicate", [lambda sam: sam, copy.deepcopy])
def test_checkpoint_loaded_into_the_base_keeps_the_sharing(duplicate):
    problem = Problem()
    sam = flatmin.SAM(problem.sgd())
    problem.steps(sam)
    sam = duplicate(sam)
    sam.base_optimizer.load_state_dict(sam.base_optimizer.state_dict())
    assert_shares(sam)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_go_on_by_themselves(duplicate, scheduled):
    problem, twin = Problem(), Problem()
    sam = flatmin.SAM(problem.sgd(), rho=0.7)
    if scheduled:
        StepLR(sam, 5)
    problem.steps(sam, 2)
    twin.model, other = duplicate((problem.model, sam))
    assert other.rho == 0.7
    assert other.skipped_steps == 0
    assert_shares(other)
    before = problem.state(sam)
    losses = twin.steps(other, 2)
    assert_same(problem.state(sam), before)
    assert torch.equal(losses, problem.steps(sam, 2))
    assert_same(problem.state(sam), twin.state(other))


def test_named_parameters_keep_their_names():
    problem = Problem()
    sam = flatmin.SAM(torch.optim.SGD(problem.model.named_parameters(), lr=0.1, momentum=0.9))
    problem.steps(sam)
    names = [name for name, _ in problem.model.named_parameters()]
    assert sam.state_dict()["param_groups"][0]["param_names"] == names
    sam.load_state_dict(sam.state_dict())
    assert_shares(sam)


def test_costs_one_copy_of_the_weights():
    size, peak = 300 * 300 * 8, []
    weight = nn.Parameter(torch.randn(300, 300, dtype=torch.float64))
    sam = flatmin.SAM(torch.optim.SGD([weight], lr=0.1))
    first = []

    def closure() -> torch.Tensor:
        sam.zero_grad()
        assert not any(gradient() is not None for gradient in first)  # freed before the second is made
        (loss := weight.square().sum()).backward()
        gradient = weight.grad  # the garbage collector knows only what Python has seen
        real = (torch.Tensor, nn.Parameter)  # and not what a compiler of another test has left
        large = [t for t in gc.get_objects() if type(t) in real and t.device.type == "cpu"]
        peak.append(len({tensor.untyped_storage().data_ptr() for tensor in large if tensor.nbytes == size}))
        if not first:
            first.append(weakref.ref(gradient))
        return loss.detach()

    sam.step(closure)
    assert peak == [2, 3]  # the weights and their gradient; and the copy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [1e-4, 300.0])
def test_norm_of_half_precision_gradients_is_taken_in_float32(dtype, value):
    # squared and summed in float16 these would be 0 and infinite
    gradients = [torch.full((1000,), value, dtype=dtype), torch.full((500,), value, dtype=dtype)]
    exact = torch.cat(gradients).double().norm().item()
    assert global_norm(gradients).dtype == torch.float32
    assert global_norm(gradients).item() == pytest.approx(exact, rel=1e-5)


def test_norm_runs_over_all_dtypes_together():
    tensors = [torch.full((4,), 3.0, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    assert global_norm(tensors).item() == pytest.approx((12 * 9) ** 0.5, rel=1e-12)
    assert global_norm(tensors).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_moved_by_rho(dtype):
    weight = nn.Parameter(torch.zeros(1000, dtype=dtype))
    sam, seen = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5), []

    def closure() -> torch.Tensor:
        seen.append(weight.detach().double().norm().item())
        weight.grad = torch.full_like(weight, 300.0)
        return torch.zeros(())

    sam.step(closure)
    assert seen == [0, pytest.approx(0.5, rel=0.01)]


def test_no_slope_means_no_perturbation():
    weight = nn.Parameter(torch.zeros(3))
    sam = flatmin.SAM(torch.optim.SGD([weight], lr=0.1))

    def closure() -> torch.Tensor:
        sam.zero_grad()
        (loss := weight.square().sum()).backward()
        return loss.detach()

    assert sam.step(closure) == 0
    assert torch.equal(weight.detach(), torch.zeros(3))


class Demanding(torch.optim.Optimizer):
    """Not torch's, and needs a closure as its LBFGS does."""

    def step(self, closure):
        return closure()


class Unfinished(torch.optim.Optimizer):
    """Around another one, as Lookahead is in some libraries, whose constructor it has in place of torch's."""

    def __init__(self, inner):
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (torch.optim.SGD, "^base_optimizer must be an instance, got the class SGD"),
        ([nn.Parameter(torch.zeros(1))], "^base_optimizer must be a torch.optim.Optimizer, got list"),
        (None, "^base_optimizer must be .* NoneType"),
        (flatmin.SAM(torch.optim.SGD([nn.Parameter(torch.zeros(1))])), "^base_optimizer is a SAM already"),
        (torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]), "^base_optimizer must .*LBFGS"),
        (
            Unfinished(torch.optim.SGD([nn.Parameter(torch.zeros(1))])),
            "^base_optimizer Unfinished .*__init__.*wrap that",
        ),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))], maximize=True), "^base_optimizer has maximize=True.*negative"),
        (Demanding([nn.Parameter(torch.zeros(1))], {}), "^base_optimizer must step without a closure.*Demanding"),
    ],
)
def test_bad_base_is_explained(base, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.SAM(base)


@pytest.mark.parametrize("rho", [0, -0.05, float("nan"), float("inf"), "big", None])
def test_bad_rho_is_named_with_its_value(rho):
    with pytest.raises(InvalidArgumentError, match=f"^rho must .*{rho!r}"):
        flatmin.SAM(Problem().sgd(), rho=rho)


def test_bad_norm_is_named_with_its_value():
    with pytest.raises(InvalidArgumentError, match=r"^unknown norm 'ranks', did you mean rank"):
        flatmin.SAM(Problem().sgd(), norm="ranks")


def backwardless(sam: flatmin.SAM, weight: nn.Parameter, calls: list[int]):
    calls.append(1)
    sam.zero_grad()
    return weight.sum()


def sparse(sam: flatmin.SAM, weight: nn.Parameter, calls: list[int]):
    calls.append(1)
    sam.zero_grad()
    (loss := F.embedding(torch.tensor([0]), weight, sparse=True).sum()).backward()
    return loss


def second_without_backward(sam: flatmin.SAM, weight: nn.Parameter, calls: list[int]):
    loss = backwardless(sam, weight, calls)
    if len(calls) == 1:
        loss.backward()
    return loss


@pytest.mark.parametrize(
    ("closure", "message", "called"),
    [
        (None, "step needs a closure", 0),
        (backwardless, "no gradient.*backward", 1),
        (second_without_backward, "no gradient.*backward", 2),
        (sparse, "sparse=False", 1),
    ],
)
def test_bad_closure_is_explained_and_changes_nothing(closure, message, called):
    weight, calls = nn.Parameter(torch.ones(3, 2)), []
    sam = flatmin.SAM(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(InvalidArgumentError, match=message):
        sam.step(closure and (lambda: closure(sam, weight, calls)))
    assert len(calls) == called
    assert torch.equal(weight.detach(), torch.ones(3, 2))
