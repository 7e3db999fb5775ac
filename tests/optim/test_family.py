"""Each method of the SAM family against its oracle, its defining property, and what all of them promise."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim import Adaptive, Elementwise, Every, Late, RhoByLR, Sometimes
from tests.optim._problem import TRAINED, Problem, assert_same
from tests.reference import oracles

# Each with arguments under which it does something visible; and whether it has two passes.
FAMILY = {
    "SAM": (lambda base, **more: flatmin.SAM(base, rho=0.5, **more), True),
    "ASAM": (lambda base, **more: flatmin.ASAM(base, rho=0.5, **more), True),
    "GSAM": (lambda base, **more: flatmin.GSAM(base, rho=0.5, alpha=0.6, **more), True),
    "LookSAM": (lambda base, **more: flatmin.LookSAM(base, rho=0.5, k=3, alpha=0.7, **more), True),
    "FriendlySAM": (lambda base, **more: flatmin.FriendlySAM(base, rho=0.5, sigma=0.9, lam=0.7, **more), True),
    "MSAM": (lambda base, **more: flatmin.MSAM(base, rho=0.5, **more), False),
    "S2SAM": (lambda base, **more: flatmin.S2SAM(base, rho=0.5, **more), False),
}
TWO = [name for name, (_, two) in FAMILY.items() if two]
every = pytest.mark.parametrize("name", FAMILY)
two_passes = pytest.mark.parametrize("name", TWO)


def make(name, base, **more):
    return FAMILY[name][0](base, **more)


class Oracle:
    """The gradients that each method steps with, from its oracle, with what it remembers."""

    def __init__(self, name: str) -> None:
        self.name, self.step, self.kept = name, 0, None

    def __call__(self, weights, gradient, velocities):
        step, self.step = self.step, self.step + 1
        if self.name == "SAM":
            return oracles.sam_gradient(weights, gradient, 0.5)[0]
        if self.name == "ASAM":
            return oracles.asam_gradient(weights, gradient, 0.5, 0.01)
        if self.name == "GSAM":
            return oracles.gsam_gradient(weights, gradient, 0.5, 0.6)
        if self.name == "LookSAM":
            found, self.kept = oracles.looksam_gradient(weights, gradient, 0.5, 0.7, self.kept if step % 3 else None)
            return found
        if self.name == "FriendlySAM":
            found, self.kept = oracles.friendly_gradient(weights, gradient, 0.5, 0.9, 0.7, self.kept)
            return found
        if self.name == "MSAM":
            return oracles.msam_gradient(weights, gradient, 0.5, velocities if step else None)
        self.kept = oracles.s2sam_gradient(weights, gradient, 0.5, self.kept)
        return self.kept


@every
def test_sgd_equals_the_oracle(name):
    problem, oracle = Problem(), Oracle(name)
    optimizer = make(name, problem.sgd(weight_decay=0.01))
    weights = [problem.model.get_parameter(n).detach().clone() for n in TRAINED]
    velocities = [torch.zeros_like(weight) for weight in weights]
    rates = {"lr": [0.1] * len(weights), "momentum": 0.9, "weight_decay": [0.01] * len(weights)}
    for _ in range(8):
        problem.steps(optimizer)
        gradient = oracle(weights, problem.gradient(TRAINED), velocities)
        weights, velocities = oracles.sgd(weights, velocities, gradient, **rates)
        for parameter, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(parameter).data, weight, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("base", ["AdamW", "AdaBelief"])
def test_adaptive_and_third_party_bases_equal_themselves_fed_with_the_oracles_gradient(name, base):
    kind = torch.optim.AdamW if base == "AdamW" else pytest.importorskip("pytorch_optimizer").AdaBelief
    problem, oracle = Problem(), Oracle(name)
    optimizer = make(name, kind(problem.model.parameters(), lr=0.01, weight_decay=0.1))
    weights = [problem.model.get_parameter(n).detach().clone().requires_grad_() for n in TRAINED]
    reference = kind(weights, lr=0.01, weight_decay=0.1)
    for _ in range(8):
        problem.steps(optimizer)
        momenta = [reference.state[w].get("exp_avg", torch.zeros_like(w)) for w in weights]
        gradients = oracle([w.detach() for w in weights], problem.gradient(TRAINED), momenta)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        reference.step()
        for parameter, weight in zip(TRAINED, weights, strict=True):
            torch.testing.assert_close(problem.model.get_parameter(parameter).data, weight.data, rtol=1e-8, atol=1e-10)


@every
def test_the_mechanism_acts(name):
    ours, plain = Problem(), Problem()
    ours.steps(make(name, ours.sgd()), 5)
    plain.steps(plain.sgd(), 5)
    assert (ours.model.head.weight - plain.model.head.weight).norm() > 1e-3


@every
def test_a_perturbation_of_no_length_is_the_base_optimizer(name):
    ours, plain = Problem(), Problem()
    optimizer = make(name, ours.sgd())
    optimizer.rho = lambda base: 0.0
    losses = ours.steps(optimizer, 5)
    assert torch.equal(losses, plain.steps(plain.sgd(), 5))
    assert len(ours.calls) == 5
    assert_same(ours.model.state_dict(), plain.model.state_dict())


def moves(problem, first=0, second=1) -> dict[str, torch.Tensor]:
    return {n: problem.calls[second][n] - problem.calls[first][n] for n in problem.calls[0]}


def length(move: dict[str, torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in move.values()]).norm().item()


@pytest.mark.parametrize("subset", [None, ["head.weight"], ["first.bias", "head.weight", "head.bias"]])
@pytest.mark.parametrize("name", ["SAM", "GSAM", "LookSAM", "FriendlySAM"])
def test_the_perturbation_has_the_length_rho_over_the_subset_alone(name, subset):
    problem = Problem()
    parameters = None if subset is None else [problem.model.get_parameter(n) for n in subset]
    optimizer = make(name, problem.sgd(), parameters=iter(parameters) if parameters else None)
    for step in range(2 if name != "LookSAM" else 1):
        problem.steps(optimizer)
        move = moves(problem, 2 * step, 2 * step + 1)
        assert length(move) == pytest.approx(0.5, rel=1e-9)
        for parameter, tensor in move.items():
            assert bool(tensor.any()) == (parameter in TRAINED and (subset is None or parameter in subset))
    assert not torch.equal(problem.calls[0]["first.weight"], problem.model.first.weight)  # all are trained


@pytest.mark.parametrize("name", ["MSAM", "S2SAM"])
@pytest.mark.parametrize("subset", [None, ["head.weight"]])
def test_one_pass_methods_move_by_rho_in_their_only_call(name, subset):
    problem = Problem()
    parameters = None if subset is None else [problem.model.get_parameter(n) for n in subset]
    optimizer = make(name, problem.sgd(), parameters=parameters)
    for step in range(3):
        before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        problem.steps(optimizer)
        move = {n: problem.calls[-1][n] - before[n] for n in before}
        assert length(move) == pytest.approx(0.5 if step else 0.0, rel=1e-9)
        moved = {n for n in move if move[n].any()}
        assert moved == (set(subset or TRAINED) if step else set())
    assert len(problem.calls) == 3


def test_msam_goes_down_the_slope_and_s2sam_up():
    """Without momentum of the past, both along the first step's gradient: exactly opposite ways."""
    found = {}
    for name in ("MSAM", "S2SAM"):
        problem = Problem()
        optimizer = make(name, problem.sgd())
        problem.steps(optimizer)
        before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        problem.steps(optimizer)
        found[name] = torch.cat([(problem.calls[-1][n] - before[n]).flatten() for n in TRAINED])
        gradient = torch.cat([g.flatten() for g in problem.gradient(TRAINED)([problem.calls[0][n] for n in TRAINED])])
        assert (found[name] @ gradient > 0) == (name == "S2SAM")
    torch.testing.assert_close(found["MSAM"], -found["S2SAM"])


def test_what_gsam_removes_is_orthogonal_to_the_perturbed_gradient():
    problem = Problem()
    seen = []
    base = problem.sgd()
    base.register_step_pre_hook(lambda *_: seen.append([problem.model.get_parameter(n).grad.clone() for n in TRAINED]))
    problem.steps(flatmin.GSAM(base, rho=0.5, alpha=0.6))
    gradient = problem.gradient(TRAINED)
    first, second = (gradient([call[n] for n in TRAINED]) for call in problem.calls)
    removed = [a - b for a, b in zip(second, seen[0], strict=True)]
    assert oracles.norm(removed) > 1e-3
    assert abs(oracles.dot(removed, second)) < 1e-12 * oracles.norm(removed) * oracles.norm(second) + 1e-15
    assert oracles.dot(removed, first) > 0


def test_what_looksam_reuses_is_orthogonal_to_the_gradient_and_alpha_long():
    problem, seen = Problem(), []
    base = problem.sgd()
    base.register_step_pre_hook(lambda *_: seen.append([problem.model.get_parameter(n).grad.clone() for n in TRAINED]))
    problem.steps(flatmin.LookSAM(base, rho=0.5, k=2, alpha=0.7), 2)
    gradient = problem.gradient(TRAINED)
    plain = gradient([problem.calls[2][n] for n in TRAINED])
    added = [a - b for a, b in zip(seen[1], plain, strict=True)]
    assert oracles.norm(added) == pytest.approx(0.7 * oracles.norm(plain), rel=1e-6)
    first = gradient([problem.calls[0][n] for n in TRAINED])
    assert abs(oracles.dot(added, first)) < 1e-9


def test_asam_is_blind_to_a_layer_that_is_rescaled():
    """The first layer times 4 and the second divided by it is the same network; at eta 0 ASAM moves it alike."""
    losses = {}
    for kind in (flatmin.SAM, lambda base, rho: flatmin.ASAM(base, rho=rho, eta=0)):
        found = []
        for factor in (1.0, 4.0):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
            problem = Problem(model)
            model[0].weight.data *= factor
            model[2].weight.data /= factor
            problem.steps(kind(problem.sgd(), rho=0.3))
            found.append(problem.losses[1].item())
        losses[kind] = found
    (sam, other), (asam, same) = losses.values()
    assert abs(sam - other) > 1e-3
    assert asam == pytest.approx(same, rel=1e-9)


def test_asam_is_sam_with_its_scaling():
    ours, theirs = Problem(), Problem()
    ours.steps(flatmin.ASAM(ours.sgd(), rho=0.5, eta=0.1), 3)
    theirs.steps(flatmin.SAM(theirs.sgd(), rho=0.5, scaling=Elementwise(0.1)), 3)
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())


def test_friendly_sam_without_sigma_is_sam():
    ours, theirs = Problem(), Problem()
    ours.steps(flatmin.FriendlySAM(ours.sgd(), rho=0.5, sigma=0), 3)
    theirs.steps(flatmin.SAM(theirs.sgd(), rho=0.5), 3)
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_looksam_calls_the_closure_twice_every_k_steps_and_once_in_the_others(k):
    problem = Problem()
    problem.steps(flatmin.LookSAM(problem.sgd(), k=k), 11)
    assert len(problem.calls) == 11 + -(-11 // k)


WHEN = {
    "every third": (lambda: Every(3), [True, False, False, True, False, False, True, False]),
    "late": (lambda: Late(0.25, 8), [False] * 6 + [True] * 2),
    "a function": (lambda: lambda step: step in (1, 4), [False, True, False, False, True, False, False, False]),
    "never": (lambda: Sometimes(0.0), [False] * 8),
    "always": (lambda: Sometimes(lambda step: 1.0), [True] * 8),
}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", [name for name in TWO if name != "LookSAM"])
def test_a_step_that_does_not_pay_is_the_base_optimizers(name, when):
    chosen, expected = WHEN[when]
    problem, twin = Problem(), Problem()
    optimizer = make(name, problem.sgd(), when=chosen())
    plain = twin.sgd()
    for pays in expected:
        twin.model.load_state_dict(problem.model.state_dict())
        before = len(problem.calls)
        if problem.state(optimizer)["optimizer"]["state"]:
            plain.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != "flatmin"})
        plain = copy.deepcopy((twin, plain))
        twin, plain = plain
        problem.steps(optimizer)
        twin.steps(plain)
        assert len(problem.calls) - before == 1 + pays
        same = torch.equal(problem.model.head.weight, twin.model.head.weight)
        assert same == (not pays)


def test_sometimes_has_its_probability_and_its_seed():
    draws = [Sometimes(0.3, seed=1)(step) for step in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.3, abs=0.03)
    assert draws == [Sometimes(0.3, seed=1)(step) for step in range(2000)]
    assert draws != [Sometimes(0.3, seed=2)(step) for step in range(2000)]


def test_adaptive_chooses_as_the_paper():
    norms = [1.0, 0.5, 2.0, 0.1, 3.0, 1.0, 1.1, 0.9, 1.0, 0.7]
    when = Adaptive(10, start=0.5, end=-2.0, decay=0.8)
    ours = []
    for step, norm in enumerate(norms):
        assert when.before(step) is None
        ours.append(when.after(step, norm))
        assert when.after(step, norm) == ours[-1]  # asking changes nothing
        when.observe(step, norm)
    assert ours == oracles.adaptive_choices(norms, 10, 0.5, -2.0, 0.8)
    assert True in ours
    assert False in ours


def test_adaptive_steps_and_resumes():
    def run(steps, state=None, model=None):
        problem = Problem()
        sam = flatmin.SAM(problem.sgd(lr=0.5), rho=0.2, when=Adaptive(40, start=0.3, end=-0.3))
        if state is not None:
            problem.model.load_state_dict(model)
            sam.load_state_dict(state)
        problem.steps(sam, steps)
        return problem, sam

    whole, optimizer = run(20)
    half, sam = run(10)
    rest, resumed = run(10, copy.deepcopy(sam.state_dict()), half.model.state_dict())
    assert 20 < len(whole.calls) < 40
    assert len(half.calls) + len(rest.calls) == len(whole.calls)
    assert_same(whole.state(optimizer), rest.state(resumed))


@every
def test_resume_is_bitwise_neutral_through_a_file(name):
    problem = Problem()
    optimizer = make(name, torch.optim.AdamW(problem.model.parameters(), lr=0.05))
    problem.steps(optimizer, 4)
    file = io.BytesIO()
    torch.save(problem.state(optimizer), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["flatmin"]["step"] == 4
    assert all(isinstance(number, int) for number in saved["optimizer"]["flatmin"]["state"])
    resumed = Problem()
    resumed.model.load_state_dict(saved["model"])
    other = make(name, torch.optim.AdamW(resumed.model.parameters(), lr=7.0))
    other.load_state_dict(saved["optimizer"])
    kept = copy.deepcopy(saved["optimizer"]["flatmin"])
    calls = len(problem.calls)
    assert torch.equal(problem.steps(optimizer, 5), resumed.steps(other, 5))
    assert len(problem.calls) - calls == len(resumed.calls)
    assert_same(problem.state(optimizer), resumed.state(other))
    assert_same(saved["optimizer"]["flatmin"], kept)  # what was loaded is not trained on


@pytest.mark.parametrize("name", ["LookSAM", "FriendlySAM", "S2SAM"])
def test_what_is_remembered_is_loaded_in_the_dtype_of_the_weights(name):
    wide, narrow = Problem(), Problem(dtype=torch.float32)
    optimizer, other = make(name, wide.sgd()), make(name, narrow.sgd())
    wide.steps(optimizer, 4)
    other.load_state_dict(optimizer.state_dict())
    kept = [t for entries in other.state_dict()["flatmin"]["state"].values() for t in entries.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    narrow.steps(other, 3)


@pytest.mark.parametrize("name", ["LookSAM", "FriendlySAM", "S2SAM"])
def test_what_a_method_remembers_matters(name):
    problem = Problem()
    optimizer = make(name, problem.sgd())
    problem.steps(optimizer, 4)
    twin, forgetful = copy.deepcopy((problem, optimizer))
    forgetful.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != "flatmin"})
    problem.steps(optimizer)
    twin.steps(forgetful)
    assert not torch.equal(problem.model.head.weight, twin.model.head.weight)


@every
def test_a_plain_state_loads_and_the_base_loads_ours(name):
    plain, problem = Problem(), Problem()
    plain.steps(base := plain.sgd(), 2)
    optimizer = make(name, problem.sgd(lr=7.0))
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    problem.steps(optimizer, 2)
    base.load_state_dict(optimizer.state_dict())
    assert_same(base.state_dict()["state"], optimizer.state_dict()["state"])


@every
def test_a_copy_goes_on_by_itself(name):
    problem = Problem()
    optimizer = make(name, problem.sgd())
    problem.steps(optimizer, 4)
    twin, other = copy.deepcopy((problem, optimizer))
    before = problem.state(optimizer)
    losses = twin.steps(other, 3)
    assert_same(problem.state(optimizer), before)
    assert torch.equal(losses, problem.steps(optimizer, 3))
    assert_same(problem.state(optimizer), twin.state(other))


def passes(name: str, step: int) -> int:
    two = FAMILY[name][1] and (name != "LookSAM" or step % 3 == 0)
    return 2 if two else 1


FAILURES = [(name, step, call) for name in FAMILY for step in (2, 3) for call in range(1, passes(name, step) + 1)]


@pytest.mark.parametrize(("name", "step", "call"), FAILURES)
@pytest.mark.parametrize("fault", ["raises", "nan", "inf"])
def test_a_step_that_fails_leaves_no_trace(name, fault, call, step):
    """Neither in the weights, nor in the base optimizer's state, nor in what the method remembers."""
    problem, twin = Problem(), Problem()
    optimizer, other = make(name, problem.sgd()), make(name, twin.sgd())
    problem.steps(optimizer, step), twin.steps(other, step)
    before = problem.state(optimizer)
    done = len(problem.calls)
    if fault == "raises":
        problem.raises = done + call
        with pytest.raises(ValueError, match="in the closure"):
            problem.steps(optimizer)
    else:
        problem.factor[done + call] = float(fault)
        with pytest.warns(NonFiniteGradientWarning):
            problem.steps(optimizer)
        assert optimizer.skipped_steps == 1
    assert len(problem.calls) == done + call
    assert_same(problem.state(optimizer), before)
    assert torch.equal(problem.steps(optimizer, 3), twin.steps(other, 3))
    assert_same(problem.state(optimizer), twin.state(other))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_are_restored_bitwise_before_the_base_steps(name, dtype):
    problem, before, seen = Problem(dtype=dtype), [], []
    base = problem.sgd()
    base.register_step_pre_hook(lambda *_: seen.append(copy.deepcopy(problem.model.state_dict())))
    optimizer = make(name, base)
    for _ in range(4):
        before.append(copy.deepcopy(problem.model.state_dict()))
        problem.steps(optimizer)
    assert_same(before, seen)


@every
def test_an_added_group_takes_part_and_a_scheduler_acts(name):
    problem = Problem()
    optimizer = make(name, torch.optim.SGD(problem.model.first.parameters(), lr=0.1, momentum=0.9))
    problem.steps(optimizer, 2)
    optimizer.add_param_group({"params": [problem.model.head.weight, problem.model.second.bias]})
    scheduler = StepLR(optimizer, 2, gamma=0.1)
    before = problem.model.head.weight.clone()
    for _ in range(4):
        problem.steps(optimizer)
        scheduler.step()
    assert not torch.equal(problem.model.head.weight, before)
    assert optimizer.base_optimizer.param_groups[1]["lr"] == pytest.approx(0.001)
    saved = optimizer.state_dict()
    assert set(saved["flatmin"]["state"]) <= {0, 1, 2, 3}
    remembers = name in ("LookSAM", "FriendlySAM", "S2SAM")
    assert (2 in saved["flatmin"]["state"]) == remembers


@every
def test_a_parameter_may_have_a_gradient_in_some_passes_only(name):
    """As with stochastic depth: here the head's, or the middle layer's, by turns and even within a step."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]).double()
    optimizer = make(name, torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9))
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        hidden = layers[len(calls) // 2 % 2](x)
        (loss := F.cross_entropy(layers[2](hidden), y)).backward()
        return loss.detach()

    for _ in range(12):
        optimizer.step(closure)
    assert all(parameter.isfinite().all() for parameter in layers.parameters())


@every
def test_a_parameter_that_is_frozen_on_the_way_stays_where_it_is(name):
    """In all passes, though there is a momentum of it, or a gradient that is remembered; and goes on when it may."""
    problem = Problem()
    optimizer = make(name, problem.sgd())
    problem.steps(optimizer, 3)
    problem.model.head.weight.requires_grad_(False)
    optimizer.zero_grad()
    done = len(problem.calls)
    problem.steps(optimizer, 3)
    here = problem.model.head.weight.detach().clone()
    assert all(torch.equal(call["head.weight"], here) for call in problem.calls[done:])
    assert any(not torch.equal(call["first.weight"], problem.calls[done]["first.weight"]) for call in problem.calls)
    problem.model.head.weight.requires_grad_(True)
    problem.steps(optimizer, 3)
    assert not torch.equal(problem.model.head.weight, here)


def test_msam_waits_for_the_momentum_of_a_subset_that_is_frozen_at_first():
    problem = Problem()
    problem.model.head.weight.requires_grad_(False)
    optimizer = flatmin.MSAM(problem.sgd(), rho=0.5, parameters=[problem.model.head.weight])
    problem.steps(optimizer, 2)
    problem.model.head.weight.requires_grad_(True)
    before = problem.model.head.weight.detach().clone()
    problem.steps(optimizer, 2)
    assert torch.equal(problem.calls[2]["head.weight"], before)
    assert (problem.calls[3]["head.weight"] - before).norm() > 0.1


@pytest.mark.parametrize("name", ["S2SAM", "LookSAM"])
def test_what_is_reused_is_the_last_gradient_and_no_older_one(name):
    weights = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2)]
    base = torch.optim.SGD(weights, lr=0.1)
    optimizer = flatmin.S2SAM(base) if name == "S2SAM" else flatmin.LookSAM(base, k=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        (loss := sum(weight.pow(4).sum() for weight in reached)).backward()
        return loss.detach()

    for reached in (weights, weights[1:]):
        optimizer.step(closure)
        assert len(optimizer.state_dict()["flatmin"]["state"]) == len(reached)


@two_passes
def test_the_second_pass_begins_without_gradients(name):
    """So that a closure that clears none, as loops for other optimizers have it, does not sum those of two passes."""
    ours, theirs = Problem(), Problem()
    optimizer, other = make(name, ours.sgd()), make(name, theirs.sgd())
    zero, other.zero_grad = other.zero_grad, lambda: None
    for _ in range(5):
        assert torch.equal(ours.steps(optimizer), theirs.steps(other))
        zero()
    assert_same(ours.state(optimizer), theirs.state(other))


@two_passes
def test_a_gradient_from_before_is_none_of_the_closures(name):
    problem = Problem()
    optimizer = make(name, problem.sgd())
    loss = problem.closure(optimizer)()
    F.cross_entropy(problem.model(problem.x), problem.y).backward()
    before = problem.state(optimizer)
    with pytest.raises(InvalidArgumentError, match=r"left no gradient.*backward"):
        optimizer.step(lambda: loss)
    assert_same(problem.state(optimizer), before)


@every
def test_gradients_may_be_zeroed_in_place(name):
    """What is kept of a gradient is a copy, or belongs to nobody else."""
    ours, theirs = Problem(), Problem()
    optimizer, other = make(name, ours.sgd()), make(name, theirs.sgd())
    for parameter in theirs.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter is not theirs.model.unused else None
    zero = other.zero_grad
    other.zero_grad = lambda: zero(set_to_none=False)
    for _ in range(5):
        assert torch.equal(ours.steps(optimizer), theirs.steps(other))
        other.zero_grad()  # between steps too
    for n in TRAINED:
        assert torch.equal(ours.model.get_parameter(n), theirs.model.get_parameter(n))


@every
@pytest.mark.parametrize("gradient", [0.0, 1e-7, 1e-5, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_may_have_tiny_gradients(name, dtype, gradient):
    """By which torch does not let rho be divided in float16."""
    weights, moved = nn.Parameter(torch.zeros(1000, dtype=dtype)), []
    optimizer = make(name, torch.optim.SGD([weights], lr=0.0, momentum=0.9))

    def closure() -> torch.Tensor:
        moved.append(weights.detach().double().norm().item())
        weights.grad = torch.full_like(weights, gradient * (2 if len(moved) % 2 else 1))
        return torch.zeros(())

    for _ in range(6):
        optimizer.step(closure)
    assert optimizer.skipped_steps == 0
    assert max(moved) == pytest.approx(0.5 if gradient else 0, rel=0.02)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "ASAM"])
def test_complex_weights_are_pairs_of_real_ones(name):
    """But for ASAM, to which the size of one is that of the pair."""
    torch.manual_seed(0)
    start, x, y = torch.randn(3, 4, 2).double(), torch.randn(6, 4).cdouble(), torch.arange(6) % 3
    real, imaginary = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_complex(start.clone()))
    others = [nn.Parameter(torch.zeros(3).double()) for _ in range(2)]
    for weight, bias in ((real, others[0]), (imaginary, others[1])):
        optimizer = make(name, torch.optim.SGD([weight, bias], lr=0.5, momentum=0.9))

        def closure(weight=weight, bias=bias, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            full = weight if weight.is_complex() else torch.view_as_complex(weight)
            (loss := F.cross_entropy((x @ full.T).abs() + bias, y)).backward()
            return loss.detach()

        for _ in range(6):
            optimizer.step(closure)
    torch.testing.assert_close(torch.view_as_real(imaginary.detach()), real.detach())
    assert not torch.equal(real.detach(), start)


@two_passes
def test_statistics_move_in_the_first_pass_only(name):
    problem = Problem(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    problem.steps(make(name, problem.sgd()), 4)
    assert problem.model[1].num_batches_tracked == 4


@pytest.mark.parametrize("name", ["MSAM", "S2SAM"])
def test_statistics_move_in_the_only_pass(name):
    problem = Problem(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    problem.steps(make(name, problem.sgd()), 4)
    assert problem.model[1].num_batches_tracked == 4


def test_sam_on_is_one_call():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))

    class CustomRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()

    model.insert(3, CustomRMSNorm())
    problem = Problem(model)
    chosen = flatmin.optim.normalization_parameters(model)
    problem.steps(flatmin.SAM(problem.sgd(), rho=0.7, parameters=chosen))
    move = moves(problem)
    assert {n for n in move if move[n].any()} <= {"1.weight", "1.bias", "3.scale", "4.weight", "4.bias"}
    assert length(move) == pytest.approx(0.7)
    assert len(chosen) == 5
    with pytest.raises(InvalidArgumentError, match="Linear has no normalisation layer"):
        flatmin.optim.normalization_parameters(nn.Linear(2, 2))


def test_rho_follows_the_learning_rate():
    problem = Problem()
    base = problem.sgd(lr=0.2)
    optimizer = flatmin.GSAM(base, rho=RhoByLR(0.4, 0.1, lr_max=0.2, lr_min=0.02), alpha=0.1)
    scheduler = CosineAnnealingLR(base, 6, eta_min=0.02)
    for step in range(6):
        expected = oracles.gsam_rho(base.param_groups[0]["lr"], 0.4, 0.1, 0.2, 0.02)
        problem.steps(optimizer)
        assert length(moves(problem, 2 * step, 2 * step + 1)) == pytest.approx(expected, rel=1e-9)
        scheduler.step()


class Operations(TorchDispatchMode):
    """Counts what is called on tensors, copies of them aside; a foreach function is one call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aside = (torch.ops.aten.clone, torch.ops.aten.empty_like, torch.ops.aten.detach)
        self.count += function.overloadpacket not in aside
        return function(*args, **(kwargs or {}))


@every
def test_no_python_loop_over_tensors_in_the_hot_path(name):
    def operations(count):
        weights = [nn.Parameter(torch.randn(3, 2)) for _ in range(count)]
        gradients = [torch.randn(3, 2) for _ in range(count)]
        optimizer = make(name, torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=True))

        def closure():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            return torch.zeros(())

        counts = []
        for _ in range(4):
            with Operations() as seen:
                optimizer.step(closure)
            counts.append(seen.count)
        return counts

    assert operations(2)[1:] == operations(50)[1:]
    assert max(operations(2)) < 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: flatmin.ASAM(p.sgd(), eta=-1), "^eta must .* >= 0, got -1"),
        (lambda p: flatmin.GSAM(p.sgd(), alpha=-0.1), "^alpha must .* >= 0, got -0.1"),
        (lambda p: flatmin.LookSAM(p.sgd(), k=0), "^k must be an integer of at least 1, got 0"),
        (lambda p: flatmin.LookSAM(p.sgd(), alpha="x"), "^alpha must .*'x'"),
        (lambda p: flatmin.FriendlySAM(p.sgd(), sigma=-1), "^sigma must"),
        (lambda p: flatmin.FriendlySAM(p.sgd(), lam=1.0), "^lam must .* < 1, got 1.0"),
        (lambda p: flatmin.MSAM(p.sgd(), rho=-3), "^rho must .*-3.*function"),
        (lambda p: flatmin.GSAM(p.sgd(), rho=RhoByLR), "^rho must .*RhoByLR.*function"),
        (lambda p: flatmin.SAM(p.sgd(), model=nn.Linear), "^model must be .*nn.Module, got .*Linear"),
        (lambda p: flatmin.SAM(p.sgd(), model=p.model.parameters()), "^model must be .*got .*generator"),
        (lambda p: flatmin.SAM(p.sgd(), when=5), "^when must be a function .*Every.* got 5"),
        (lambda p: flatmin.SAM(p.sgd(), when=Every), "^when must be a function"),
        (lambda p: flatmin.SAM(p.sgd(), scaling=0.1), "^scaling must .* got 0.1"),
        (lambda p: flatmin.SAM(p.sgd(), parameters=[]), "^parameters is empty"),
        (lambda p: flatmin.SAM(p.sgd(), parameters=5), "^parameters must be several tensors, got int"),
        (lambda p: flatmin.SAM(p.sgd(), parameters=p.model.unused), "^parameters must be several tensors"),
        (lambda p: flatmin.SAM(p.sgd(), parameters=p.model.named_parameters()), "^parameters .*tuple at index 0.*pair"),
        (
            lambda p: flatmin.SAM(p.sgd(), parameters=[nn.Parameter(torch.ones(7))]),
            r"shape \(7,\) at index 0 .*not have",
        ),
        (lambda p: Every(0), "^k must"),
        (lambda p: Late(1.5, 10), "^share must"),
        (lambda p: Late(0.5, 0), "^steps must"),
        (lambda p: Sometimes(2), "^probability must"),
        (lambda p: Adaptive(0), "^steps must"),
        (lambda p: Adaptive(9, decay=1), "^decay must"),
        (lambda p: RhoByLR(0.1, -0.1, lr_max=1), "^rho_min must"),
        (lambda p: RhoByLR(0.1, 0.1, lr_max=0), "^lr_max must .* > 0, got 0"),
    ],
)
def test_bad_arguments_are_named_with_their_value(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(Problem())


@every
def test_bad_bases_and_closures_are_explained(name):
    with pytest.raises(InvalidArgumentError, match=r"must be an instance, got the class SGD; write SGD\("):
        make(name, torch.optim.SGD)
    with pytest.raises(InvalidArgumentError, match="LBFGS"):
        make(name, torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))
    problem = Problem()
    optimizer = make(name, problem.sgd())
    with pytest.raises(InvalidArgumentError, match="already"):
        make(name, optimizer)
    with pytest.raises(InvalidArgumentError, match=f"^{type(optimizer).__name__}.step needs a closure.*def closure"):
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match=r"left no gradient.*backward"):
        optimizer.step(lambda: torch.zeros(()))
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = make(name, torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(InvalidArgumentError, match="sparse=False"):
        optimizer.step(lambda: F.embedding(torch.tensor([0]), weight, sparse=True).sum().backward())


def test_a_schedule_that_is_no_length_is_explained():
    problem = Problem()
    with pytest.raises(InvalidArgumentError, match=r"^rho must .*-1.*from its schedule"):
        problem.steps(flatmin.SAM(problem.sgd(), rho=lambda base: -1))


def test_a_subset_that_is_not_trained_is_explained():
    problem = Problem()
    optimizer = flatmin.SAM(problem.sgd(), parameters=[problem.model.unused])
    with pytest.raises(InvalidArgumentError, match="none of the parameters that SAM was given"):
        problem.steps(optimizer)


def test_msam_without_a_momentum_is_explained():
    problem = Problem()
    optimizer = flatmin.MSAM(problem.sgd(momentum=0))
    with pytest.raises(InvalidArgumentError, match=r"SGD keeps none of momentum_buffer, exp_avg.*S2SAM"):
        problem.steps(optimizer, 2)


WITHOUT = {
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("last", [False, True])
def test_msam_is_explained_where_one_of_several_keeps_no_momentum(kind, last):
    """Its parameters would never be perturbed; nothing is said where they are not to be."""
    problem = Problem()
    weights = [weight for weight in problem.model.parameters() if weight is not problem.model.unused]
    some, rest = weights[:1], weights[1:]
    bases = [WITHOUT[kind](some), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
    bases = bases[::-1] if last else bases
    with pytest.raises(InvalidArgumentError, match=r"keeps none of momentum_buffer.*S2SAM.*parameters="):
        problem.steps(flatmin.MSAM(bases), 2)
    problem.steps(flatmin.MSAM(bases, parameters=rest), 2)
    unused = torch.optim.Adam([problem.model.unused])  # has never stepped
    problem.steps(flatmin.MSAM([bases[0 if last else 1], unused]), 2)


@pytest.mark.parametrize("entry", [{9: {"momentum": torch.ones(2)}}, {1: {"momentum": torch.ones(2)}}])
def test_a_state_of_other_parameters_is_refused_and_changes_nothing(entry):
    problem = Problem()
    optimizer = make("FriendlySAM", problem.sgd())
    problem.steps(optimizer, 2)
    before = problem.state(optimizer)
    with pytest.raises(InvalidArgumentError, match=r"^state_dict\['flatmin'\] has .* same parameters"):
        optimizer.load_state_dict({**before["optimizer"], "flatmin": {"step": 2, "state": entry}})
    assert_same(problem.state(optimizer), before)


def test_dropped_steps_are_said_once_for_each_optimizer():
    problem = Problem()
    optimizer = make("S2SAM", problem.sgd())
    problem.factor = dict.fromkeys(range(1, 4), float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.steps(optimizer, 3)
    assert [str(w.message).startswith("the only gradient of a S2SAM step") for w in caught] == [True]
