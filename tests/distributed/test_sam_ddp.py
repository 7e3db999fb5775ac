"""SAM under DistributedDataParallel: whose gradient perturbs, and that ranks never part or wait in vain."""

import contextlib
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import flatmin
from flatmin.errors import NonFiniteGradientWarning
from flatmin.optim import _second_pass
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks
from tests.reference import oracles

RHO, STEPS = 0.5, 5
HOWS = ["hook", "model", "inner model", "compiled outside", "compiled outside, hook", "compiled inside"]


def closure_of(model, optimizer, step: int, parts: int = 1, no_sync=contextlib.nullcontext):
    """A closure that may go over micro-batches, all but the last of them in ``no_sync()``."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total, (x, y) = 0, problem.batch(step)
        for part, (inputs, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            with no_sync() if part < parts - 1 else contextlib.nullcontext():
                (loss := F.cross_entropy(model(inputs), labels) / parts).backward()
            total += loss.detach()
        return total

    return closure


def train(norm: str, how: str = "hook", parts: int = 1, no_sync: bool = False, base=problem.sgd):
    """Weights after training on this rank, and how many gradients were communicated."""
    inner = problem.network()
    ddp = DistributedDataParallel(torch.compile(inner, backend="eager") if how == "compiled inside" else inner)
    communicated = []
    ddp.register_comm_hook(None, counting(communicated))
    model = torch.compile(ddp, backend="eager") if how.startswith("compiled outside") else ddp
    known = {"model": ddp, "inner model": inner, "compiled outside": model}.get(how)
    optimizer = flatmin.SAM(base(ddp), rho=RHO, norm=norm, model=known)
    with warnings.catch_warnings():
        if how.startswith("compiled") or known is not None:
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        for step in range(STEPS):
            optimizer.step(
                closure_of(model, optimizer, step, parts, ddp.no_sync if no_sync else contextlib.nullcontext)
            )
            assert ddp.require_backward_grad_sync
    assert not torch.nn.modules.module._global_forward_pre_hooks
    return problem.weights(inner), len(communicated)


def counting(communicated: list[int]):
    def hook(_, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        communicated.append(1)
        work = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    return hook


def definition(world_size: int) -> list[torch.Tensor]:
    """m-sharpness: each rank's e from its own gradient, and the mean of the gradients at w + e of each."""
    model = problem.network()
    names, weights = zip(*model.named_parameters(), strict=True)
    weights = [weight.detach() for weight in weights]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for step in range(STEPS):
        x, y = problem.batch(step)
        gradients = []
        for inputs, labels in zip(x.chunk(world_size), y.chunk(world_size), strict=True):

            def loss(weights, inputs=inputs, labels=labels):
                return F.cross_entropy(functional_call(model, dict(zip(names, weights, strict=True)), inputs), labels)

            gradients.append(oracles.sam_gradient(weights, oracles.autograd(loss), RHO)[0])
        mean = [sum(parts) / world_size for parts in zip(*gradients, strict=True)]
        rates = {"lr": [0.2] * len(weights), "momentum": 0.9, "weight_decay": [0.0] * len(weights)}
        weights, velocities = oracles.sgd(weights, velocities, mean, **rates)
    return weights


def alone() -> list[torch.Tensor]:
    model = problem.network()
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO)
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
    return problem.weights(model)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("norm", ["rank", "global"])
def test_each_norm_is_what_it_says_and_ranks_stay_alike(norm, world_size):
    (ours, communicated), *others = run_ranks(train, world_size, norm)
    for weights, _ in others:
        problem.assert_same(ours, weights)
    problem.assert_close(ours, definition(world_size) if norm == "rank" else alone())
    assert problem.differ(definition(world_size), alone())
    assert communicated == (STEPS if norm == "rank" else 2 * STEPS)


@pytest.mark.parametrize("how", HOWS[1:])
def test_the_module_is_found_however_it_is_wrapped(how):
    for weights, communicated in run_ranks(train, 2, "rank", how):
        problem.assert_close(weights, definition(2))
        assert communicated == STEPS


@pytest.mark.parametrize("no_sync", [True, False])
@pytest.mark.parametrize("norm", ["rank", "global"])
def test_micro_batches_make_no_difference(norm, no_sync):
    for weights, communicated in run_ranks(train, 2, norm, "hook", 2, no_sync):
        problem.assert_close(weights, definition(2) if norm == "rank" else alone())
        passes = STEPS if norm == "rank" else 2 * STEPS
        assert communicated == (passes if no_sync else 2 * passes)


def train_static_graph() -> list[torch.Tensor]:
    model = DistributedDataParallel(problem.network(), static_graph=True)
    optimizer, seen = flatmin.SAM(problem.sgd(model), rho=RHO), []
    for step in range(STEPS):
        optimizer.step(closure_of(lambda x: seen.append(problem.weights(model)) or model(x), optimizer, step))
    return [torch.cat([weight.flatten() for weight in weights]) for weights in seen]


def test_a_static_graph_synchronises_in_its_very_first_pass_alone():
    """Which torch cannot do without; the perturbations are alike in that step and in no other."""
    ours, theirs = run_ranks(train_static_graph, 2)
    assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True, True] + [True, False] * (STEPS - 1)


def train_inside_no_sync() -> list[torch.Tensor]:
    model = problem.replicated()
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO)
    with model.no_sync():
        optimizer.step(closure_of(model, optimizer, 0))
        assert not model.require_backward_grad_sync
    assert model.require_backward_grad_sync
    return problem.weights(model)


def test_a_no_sync_of_the_users_goes_on_to_hold():
    ours, theirs = run_ranks(train_inside_no_sync, 2)
    assert problem.differ(ours, theirs)


def raise_in(call: int) -> None:
    model, calls = problem.replicated(), []
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO)
    before = problem.weights(model)

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = closure_of(model, optimizer, 0)()
        if len(calls) == call:
            raise ValueError("in the closure")
        return loss

    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(closure)
    assert model.require_backward_grad_sync
    assert not torch.nn.modules.module._global_forward_pre_hooks
    problem.assert_same(problem.weights(model), before)
    optimizer.step(closure)
    assert problem.differ(problem.weights(model), before)


@pytest.mark.parametrize("call", [1, 2])
def test_synchronisation_is_put_back_when_the_closure_raises(call):
    run_ranks(raise_in, 2, call)


def one_rank_is_not_finite(norm: str, call: int, value: float) -> tuple[list[torch.Tensor], int]:
    model, calls = problem.replicated(), []
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO, norm=norm)

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = problem.loss_of(model, step)
        broken = step in (1, 3) and len(calls) == call and problem.rank() == 1
        (loss * (value if broken else 1)).backward()
        return loss.detach()

    for step in range(STEPS):
        calls.clear()
        before = problem.weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteGradientWarning)
            optimizer.step(closure)
        assert len(calls) == (call if step in (1, 3) else 2)
        assert problem.differ(problem.weights(model), before) == (step not in (1, 3))
    return problem.weights(model), optimizer.skipped_steps


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("norm", ["rank", "global"])
def test_all_ranks_drop_a_step_that_is_not_finite_on_one(norm, call, value):
    (ours, skipped), (theirs, also) = run_ranks(one_rank_is_not_finite, 2, norm, call, value)
    assert skipped == also == 2
    assert all(weight.isfinite().all() for weight in ours)
    problem.assert_same(ours, theirs)


def overflow(norm: str, call: int) -> tuple[list[torch.Tensor], list[float]]:
    """Weights and scales where a pass overflows on the last rank alone."""
    model, calls, scales = problem.replicated(), [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO, norm=norm, scaler=scaler)

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = problem.loss_of(model, step)
        broken = step in (1, 3) and len(calls) == call and problem.rank() == 1
        scaler.scale(loss * (float("inf") if broken else 1)).backward()
        return loss.detach()

    for step in range(STEPS):  # noqa: B007 the closure's
        calls.clear()
        optimizer.step(closure)
        scaler.update()
        scales.append(scaler.get_scale())
    assert optimizer.skipped_steps == 2
    return problem.weights(model), scales


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("norm", ["rank", "global"])
def test_an_overflow_on_one_rank_lowers_the_scale_on_all(norm, call):
    (ours, scales), (theirs, others) = run_ranks(overflow, 2, norm, call)
    assert scales == others == [1024, 512, 512, 256, 256]
    problem.assert_same(ours, theirs)


def without_a_closure(norm: str, two_steps: bool) -> list[torch.Tensor]:
    model = problem.replicated()
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO, norm=norm)
    for step in range(STEPS):
        make_pass = closure_of(model, optimizer, step)
        if two_steps:
            make_pass()
            assert optimizer.first_step()
            make_pass()
            optimizer.second_step()
        else:
            for _ in optimizer.passes():
                make_pass()
    return problem.weights(model)


@pytest.mark.parametrize(("norm", "two_steps"), [("rank", False), ("global", False), ("global", True)])
def test_loops_without_a_closure_are_what_the_norm_says(norm, two_steps):
    for weights in run_ranks(without_a_closure, 2, norm, two_steps):
        problem.assert_close(weights, definition(2) if norm == "rank" else alone())


def test_first_step_cannot_keep_a_gradient_to_a_rank_and_says_so():
    with pytest.raises(RuntimeError, match=r"'rank' is for those of one rank; make it SAM\(.*'global'\)"):
        run_ranks(without_a_closure, 2, "rank", True)


def statistics() -> dict[str, torch.Tensor]:
    model = problem.replicated(norm=True)
    optimizer = flatmin.SAM(problem.sgd(model), rho=RHO)
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
    return model.module[1].state_dict()


def test_batch_norm_counts_each_batch_once_and_weights_stay_alike():
    ours, theirs = run_ranks(statistics, 2)
    assert ours["num_batches_tracked"] == theirs["num_batches_tracked"] == STEPS
    assert torch.equal(ours["weight"], theirs["weight"])


def test_one_process_neither_looks_for_the_module_nor_communicates(monkeypatch):
    original = _second_pass.each_module

    def each_module(visit, model=None):
        return pytest.fail("looked") if visit.__name__ == "stop" else original(visit, model)  # not for statistics

    monkeypatch.setattr(_second_pass, "each_module", each_module)
    monkeypatch.setattr(distributed, "all_reduce", lambda *_: pytest.fail("communicated"))
    model = nn.Linear(4, 3)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        (loss := model(torch.ones(2, 4)).square().sum()).backward()
        return loss.detach()

    assert optimizer.step(closure) > 0
