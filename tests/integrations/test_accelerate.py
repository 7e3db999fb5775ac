"""sharpness_aware with Accelerate: the weights are those of the method written out by hand, over the same batches."""

import contextlib
import copy
import functools

import pytest

pytest.importorskip("accelerate")

import accelerate
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, MissingDependencyError, NonFiniteGradientWarning
from flatmin.integrations.accelerate import _package, sharpness_aware
from flatmin.optim import Adaptive, Every
from tests.contracts._optimizers import CLOSURES, EVERY, VISIBLE
from tests.integrations._accelerate import (
    EPOCHS,
    B,
    N,
    Run,
    accelerator,
    data,
    difference,
    loader,
    network,
    order,
    reset,
    sam_by_hand,
    sgd,
    windows,
)


@pytest.fixture(autouse=True)
def _reset():
    yield
    reset()


def by_norm(accelerator, model):
    accelerator.clip_grad_norm_(model.parameters(), 0.1)


def by_value(accelerator, model):
    accelerator.clip_grad_value_(model.parameters(), 0.01)


CLIPPING = functools.partial(flatmin.SAM, max_norm=0.1)
HALF = {"dtype": torch.float16, "scale": 256.0}
# What the run is made with, and the same by hand.
CASES = {
    "plain": ({}, {}),
    "accumulation of 2": ({"accumulate": 2}, {"accumulate": 2}),
    "accumulation of 3": ({"accumulate": 3}, {"accumulate": 3}),
    "max_norm": (
        {"make": CLIPPING, "accumulate": 2},
        {"clip": 0.1, "accumulate": 2},
    ),
    "clipped by norm": ({"clip": by_norm}, {"clip": 0.1}),
    "clipped by value": ({"clip": by_value, "accumulate": 3}, {"clip_value": 0.01, "accumulate": 3}),
    "bfloat16": ({"precision": "bf16", "accumulate": 2}, {"dtype": torch.bfloat16, "accumulate": 2}),
    "float16": ({"precision": "fp16"}, HALF),
    "float16, accumulated and clipped": (
        {"precision": "fp16", "accumulate": 2, "clip": by_norm},
        {**HALF, "accumulate": 2, "clip": 0.1},
    ),
    "float16, max_norm": (
        {"precision": "fp16", "accumulate": 3, "make": CLIPPING},
        {**HALF, "accumulate": 3, "clip": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", [{}, {"norm": True, "dropout": 0.3}], ids=["plain", "norm, dropout"])
def test_sam_is_that_by_hand(case, architecture):
    options, by_hand = CASES[case]
    run, net = Run(**options, **architecture).fit(), network(**architecture)
    losses = sam_by_hand(net, **by_hand)
    assert difference(run.net, net) < 1e-6
    assert difference(run.net, network(**architecture)) > 5e-3
    assert [float(loss) for loss in run.losses if loss is not None] == pytest.approx(losses, rel=1e-5)
    due = [loss is not None for loss in run.losses]
    count = by_hand.get("accumulate", 1)
    assert due == [(k + 1) % count == 0 or k == 4 for k in range(5)] * EPOCHS


def test_the_perturbation_is_at_work():
    net, plain = network(), network()
    sam_by_hand(net)
    sam_by_hand(plain, rho=0.0)
    assert difference(net, plain) > 1e-4


# Every method, and losses.


def own_loop(make, accumulate=1, penalty=None):
    """One of flatmin's optimizers in a loop with closures, without Accelerate."""
    net = network(norm=True, dropout=0.3)
    torch.manual_seed(7)
    optimizer = make(sgd(net))
    term = None if penalty is None else penalty(net, optimizer)
    for window in windows(accumulate):

        def closure(window=window):
            optimizer.zero_grad()
            for x, y in window:
                logits = net(x)
                loss = F.cross_entropy(logits, y)
                loss = loss if term is None else loss + term(logits, x)
                (loss / accumulate).backward()

        optimizer.step(closure)
    return net


METHODS = {
    **{name: (EVERY[name], VISIBLE.get(name, {})) for name in CLOSURES},
    "Adaptive": (flatmin.SAM, {"when": Adaptive(steps=10)}),
    "Every": (flatmin.SAM, {"when": Every(2)}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", [False, True], ids=["", "model="])
def test_every_method_is_that_of_an_own_loop(name, given):
    method, keywords = METHODS[name]

    def make(base):
        owned = {parameter for group in base.param_groups for parameter in group["params"]}
        known = {"model": nets[0]} if given and next(nets[0].parameters()) in owned else {}
        return method(base, max_norm=0.3, **known, **copy.deepcopy(keywords))

    nets = [network(norm=True, dropout=0.3)]
    run = Run.__new__(Run)
    run.net, run.accelerator, run.penalty, run.losses = nets[0], accelerator(2), None, []
    run.model, run.optimizer = run.accelerator.prepare(run.net, make(sgd(run.net)))
    run.step = sharpness_aware(run.accelerator, run.model, run.optimizer, loss=run.loss)
    run.fit()
    assert difference(run.net, own_loop(make, 2)) < 1e-6
    assert run.optimizer.state_dict()["flatmin"]["step"] == 6


def test_mesa_beside_sam():
    def penalty(net, optimizer):
        mesa = flatmin.MESA(net, decay=0.9, coefficient=1.0, start_epoch=0)
        mesa.attach(optimizer)
        return mesa

    run = Run(accumulate=2, norm=True, dropout=0.3)
    run.penalty = mesa = penalty(run.net, run.optimizer)  # the prepared one
    run.fit()
    kept = []
    net = own_loop(flatmin.SAM, 2, lambda *args: kept.append(penalty(*args)) or kept[0])
    assert difference(run.net, net) < 1e-6
    assert difference(mesa.average.module, kept[0].average.module) < 1e-6
    assert difference(run.net, own_loop(flatmin.SAM, 2)) > 1e-4


def train_with_saf(make, wrap):
    """SAF, with the indices of ``wrap``'s loaders, in steps of two micro-batches; returns the network and SAF."""
    net, acc = network(), accelerator(2)
    saf = flatmin.SAF(N, 10, lag=1, coefficient=1.0, start_epoch=0)
    model, optimizer = acc.prepare(net, make(sgd(net)))
    saf.attach(optimizer)
    x, y = data()

    def loss(index, x, y):
        logits = model(x)
        return F.cross_entropy(logits, y) + saf(logits, index)

    step = sharpness_aware(acc, model, optimizer, loss=loss)
    for epoch in range(EPOCHS):
        saf.set_epoch(epoch)
        shuffled = torch.utils.data.DataLoader(TensorDataset(x, y), B, sampler=order(epoch))
        for index, (x_, y_) in wrap(acc, shuffled):
            assert torch.equal(x[index], x_)
            step(index, x_, y_)
    return net, saf


LOADERS = {
    "with_indices of a prepared loader": lambda acc, batches: flatmin.with_indices(acc.prepare(batches)),
    "indexed": lambda acc, batches: map(
        flatmin.indices.split,
        acc.prepare(DataLoader(flatmin.indexed(batches.dataset), B, sampler=batches.sampler)),
    ),
}


@pytest.mark.parametrize("way", LOADERS)
def test_saf_beside_a_method_of_one_pass(way):
    net, _ = train_with_saf(flatmin.MSAM, LOADERS[way])
    other = network()
    optimizer, saf = flatmin.MSAM(sgd(other)), flatmin.SAF(N, 10, lag=1, coefficient=1.0, start_epoch=0)
    x, y = data()
    penalties = 0.0
    for epoch in range(EPOCHS):
        saf.set_epoch(epoch)
        parts = torch.tensor(order(epoch)).split(B)
        for start in range(0, len(parts), 2):

            def closure(window=parts[start : start + 2]):
                nonlocal penalties
                optimizer.zero_grad()
                for index in window:
                    logits = other(x[index])
                    penalty = saf(logits, index)
                    penalties += float(penalty.detach())
                    ((F.cross_entropy(logits, y[index]) + penalty) / 2).backward()

            optimizer.step(closure)
    assert penalties > 0
    assert difference(net, other) < 1e-6


def test_saf_beside_two_passes_is_refused():
    with pytest.raises(InvalidArgumentError, match="use SAF or SAM, not both"):
        train_with_saf(flatmin.SAM, LOADERS["indexed"])


# Steps that are dropped, schedulers, errors.


@pytest.mark.parametrize("call", [0, 3], ids=["first pass", "second pass"])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_pass_that_is_not_finite_drops_the_step(call, precision):
    run = Run(accumulate=2, precision=precision, norm=True)
    calls = iter(range(100))
    run.penalty = lambda logits, x: logits.sum() * (float("inf") if next(calls) == call else 0.0)
    batches = list(loader(0))[:2]
    with contextlib.nullcontext() if precision == "fp16" else pytest.warns(NonFiniteGradientWarning):
        for batch in batches:
            run.step(*batch)
    assert difference(run.net, network(norm=True)) == 0
    assert run.optimizer.optimizer.skipped_steps == 1
    if precision == "fp16":
        assert run.accelerator.optimizer_step_was_skipped
        assert run.accelerator.scaler.get_scale() == 128.0
    for batch in batches:
        run.step(*batch)
    assert difference(run.net, network(norm=True)) > 1e-3
    assert not run.accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize("around", [lambda optimizer: optimizer, lambda optimizer: optimizer.optimizer.base_optimizer])
def test_a_prepared_scheduler_steps_with_the_optimizer(around):
    run = Run(accumulate=2)
    scheduler = run.accelerator.prepare(torch.optim.lr_scheduler.StepLR(around(run.optimizer), 1, gamma=0.5))
    for x, y in run.accelerator.prepare_data_loader(loader(0)):
        run.step(x, y)
        scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_an_error_in_the_second_pass_leaves_the_weights_as_they_were():
    run = Run(norm=True)
    calls = iter(range(100))

    def penalty(logits, x):
        if next(calls) == 1:
            raise KeyError("in the second pass")
        return 0.0

    run.penalty = penalty
    with pytest.raises(KeyError, match="second pass"):
        run.fit()
    weights = dict(run.net.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in network(norm=True).named_parameters())
    other = Run(norm=True)
    other.net.load_state_dict(run.net.state_dict())
    assert difference(run.fit().net, other.fit().net) == 0


# Resume.


def resumable(method, accumulate=2):
    run = Run(method, accumulate=accumulate, norm=True, dropout=0.3)
    run.penalty = run.mesa = flatmin.MESA(run.net, decay=0.9, coefficient=1.0, start_epoch=0)
    run.mesa.attach(run.optimizer)
    return run


@pytest.mark.parametrize("method", [flatmin.SAM, functools.partial(flatmin.LookSAM, k=3), flatmin.MSAM])
def test_resume_by_save_state(method, tmp_path):
    whole = resumable(method).fit(0)
    whole.accelerator.save_state(str(tmp_path))
    whole.fit(1)
    resumed = resumable(method)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.fit(1)
    assert difference(whole.net, resumed.net) == 0
    assert difference(whole.mesa.average.module, resumed.mesa.average.module) == 0
    assert whole.optimizer.state_dict()["flatmin"]["step"] == 6


def test_resume_within_an_epoch(tmp_path):
    whole, resumed = (Run(functools.partial(flatmin.LookSAM, k=2), accumulate=2, norm=True) for _ in range(2))
    for number, batch in enumerate(whole.accelerator.prepare_data_loader(loader(0)), start=1):
        whole.step(*batch)
        if number == 2:
            whole.accelerator.save_state(str(tmp_path))
    resumed.accelerator.load_state(str(tmp_path))
    batches = resumed.accelerator.prepare_data_loader(loader(0))
    due = [resumed.step(*batch) is not None for batch in accelerate.skip_first_batches(batches, 2)]
    assert due == [False, True, True]
    assert difference(whole.net, resumed.net) == 0


def test_a_window_that_is_open_is_not_saved(tmp_path):
    run = resumable(flatmin.SAM, accumulate=3)
    batches = list(loader(0))
    run.step(*batches[0])
    with pytest.warns(FlatminWarning, match="leaves out 1 micro-batches"):
        run.accelerator.save_state(str(tmp_path))
    run.accelerator.load_state(str(tmp_path))
    assert run.step(*batches[1]) is None  # the second of three, as Accelerate counts
    calls = []
    run.penalty = lambda logits, x: calls.append(len(x)) or 0.0
    assert run.step(*batches[2]) is not None
    assert calls == [B, B] * 2


# What is refused.


def prepared(make=flatmin.SAM, **options):
    run = Run(make, **options)
    return run.accelerator, run.model, run.optimizer


def loss_of(x, y):
    return x


def _unprepared():
    acc, model, _ = prepared()
    return acc, model, flatmin.SAM(sgd(model))


def _plain():
    acc, model = accelerator(), network()
    return acc, *acc.prepare(model, sgd(model))


def _esam():
    acc, model = accelerator(), network()
    return acc, *acc.prepare(model, flatmin.ESAM(sgd(model)))


def _scaled():
    acc, model = accelerator(), network()
    return acc, *acc.prepare(model, flatmin.SAM(sgd(model), scaler=torch.amp.GradScaler("cpu")))


def _of_another():
    return accelerator(), *prepared()[1:]


def _sharded():
    acc, *others = prepared()
    acc.state.distributed_type = accelerate.DistributedType.FSDP
    return acc, *others


REFUSED = {
    "unprepared optimizer": (_unprepared, r"optimizer \(SAM\) is not what accelerator.prepare returned"),
    "plain optimizer": (_plain, r"prepare\(flatmin.SAM\(SGD\(...\)\)\)"),
    "ESAM": (_esam, "use flatmin.SAM, or to pay less"),
    "another scaler": (_scaled, "leave scaler= out"),
    "another accelerator": (_of_another, "is not what accelerator.prepare returned"),
    "unprepared model": (lambda: (prepared()[0], network(), prepared()[2]), r"model \(Sequential\) is not what"),
    "no accelerator": (lambda: (None, None, None), "must be accelerate.Accelerator, got NoneType"),
    "sharded": (_sharded, "got FSDP"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_are_refused(case):
    make, words = REFUSED[case]
    arguments = make()
    with pytest.raises(InvalidArgumentError, match=words):
        sharpness_aware(*arguments, loss=loss_of)


def test_functions_are_checked():
    with pytest.raises(InvalidArgumentError, match="loss must be a function, got int"):
        sharpness_aware(*prepared(), loss=3)
    with pytest.raises(InvalidArgumentError, match="clip must be a function, got float"):
        sharpness_aware(*prepared(), loss=loss_of, clip=1.0)


@pytest.mark.parametrize("returns", [lambda loss: loss, torch.Tensor.detach, lambda _: None])
def test_a_loss_that_goes_backward_itself_is_refused(returns):
    run = Run()

    def loss(x, y):
        value = F.cross_entropy(run.model(x), y)
        value.backward()
        return returns(value)

    run.step = sharpness_aware(run.accelerator, run.model, run.optimizer, loss=loss)
    with pytest.raises(InvalidArgumentError, match="let it compute and return the loss, and nothing else"):
        run.fit()
    assert difference(run.net, network()) == 0


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "got NoneType"),
        (torch.ones(3), r"got a tensor of shape \(3,\)"),
        (torch.tensor(1.0), "needs no gradient"),
    ],
)
def test_what_loss_returns_is_checked(returned, words):
    run = Run()
    run.step = sharpness_aware(run.accelerator, run.model, run.optimizer, loss=lambda *_: returned)
    with pytest.raises(InvalidArgumentError, match=words):
        run.fit()
    assert difference(run.net, network()) == 0


def test_two_wrappers_are_refused():
    acc, model = accelerator(), network()
    with pytest.raises(InvalidArgumentError, match="wrap the plain optimizer once"):
        flatmin.SAM(flatmin.SAM(sgd(model)))
    optimizer = acc.prepare(sgd(model))
    with pytest.raises(InvalidArgumentError, match="AcceleratedOptimizer around it"):
        flatmin.SAM(optimizer)


def test_a_step_inside_accumulate_is_refused():
    run = Run(accumulate=3)
    with pytest.raises(InvalidArgumentError, match=r"outside of accelerator.accumulate\(\)"):
        for batch in loader(0):
            with run.accelerator.accumulate(run.model):
                run.step(*batch)
    once = Run()
    for batch in loader(0):
        with once.accelerator.accumulate(once.model):
            assert once.step(*batch) is not None


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr(accelerate, "__version__", "1.2.1")
    with pytest.raises(MissingDependencyError, match=r"accelerate 1.2.1 is too old, 1.15 is needed; pip install"):
        _package.check_package()


# step(closure) of the prepared optimizer.


def by_closure(run, batch, step=None):
    def closure():
        run.optimizer.optimizer.zero_grad()
        loss = run.loss(*batch)
        run.accelerator.backward(loss)
        return loss

    return (step or run.optimizer.step)(closure)


@pytest.mark.parametrize("method", ["SAM", "MSAM", "LookSAM"])
def test_a_closure_under_accumulation_is_refused(method):
    run = Run(EVERY[method], accumulate=2)
    with pytest.raises(InvalidArgumentError, match="gradient_accumulation_steps=2, of which the closure sees the last"):
        for batch in loader(0):
            with run.accelerator.accumulate(run.model):
                by_closure(run, batch)
    assert difference(run.net, network()) == 0
    by_closure(run, batch, run.optimizer.optimizer.step)  # which may go over all
    assert difference(run.net, network()) > 1e-3


def test_a_closure_with_the_scaler_is_refused():
    run = Run(precision="fp16")
    batch = next(iter(loader(0)))
    run.accelerator.backward(run.loss(*batch))
    with pytest.raises(InvalidArgumentError, match="a scaler, which takes no closures"):
        by_closure(run, batch)
    assert difference(run.net, network()) == 0


def test_a_closure_without_accumulation_is_a_step():
    run, net = Run(norm=True), network(norm=True)
    torch.manual_seed(7)
    for epoch in range(EPOCHS):
        for batch in loader(epoch):
            by_closure(run, batch)
    sam_by_hand(net)
    assert difference(run.net, net) < 1e-6


def test_a_step_without_anything_names_the_way():
    run = Run()
    run.accelerator.backward(run.loss(*next(iter(loader(0)))))
    with pytest.raises(InvalidArgumentError, match=r"flatmin\.integrations\.accelerate\.sharpness_aware"):
        run.optimizer.step()
