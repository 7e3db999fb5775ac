"""What would be without privacy, or cannot be right, with Opacus is an error that names the way out."""

import sys

import pytest

pytest.importorskip("opacus")

import opacus
import torch
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError, MissingDependencyError, StateDictError
from flatmin.integrations.opacus import DPSAT, _package
from tests.contracts._optimizers import EVERY
from tests.integrations._opacus import CLASSES, MODES, Private, data, flat, quiet, sgd

WHY = r"privacy.*flatmin\.integrations\.opacus\.DPSAT\(module=model, optimizer=optimizer\)"


@pytest.fixture(autouse=True)
def _quiet():
    quiet()


# Every optimizer of flatmin's around Opacus' optimizer, beside it, or in it.


@pytest.mark.parametrize(("mode", "wrap"), MODES)
def test_around_or_beside_the_private_optimizer(mode, wrap):
    private = Private(mode, wrap)
    for kind in EVERY.values():
        for base in (private.optimizer, [private.optimizer], sgd(private.net), [sgd(private.net)]):
            with pytest.raises(InvalidArgumentError, match=f"^base_optimizer .*without {WHY}"):
                kind(base)


def ways(private):
    """All ways to make a step of an optimizer of flatmin's that make_private was given, in Opacus' loop or past it."""
    inner, (x, y) = private.optimizer.original_optimizer, data()

    def closure():
        private.optimizer.zero_grad()
        return private.backward(x, y)

    def losses(keep):
        return F.cross_entropy(private.call(x[keep]), y[keep], reduction="none")

    yield lambda: [closure(), private.optimizer.step()]
    yield lambda: private.optimizer.step(closure)
    yield lambda: inner.step(losses if inner.per_sample_closure else closure)
    yield lambda: [closure() for _ in inner.passes()]
    yield lambda: [closure(), inner.perturb()]
    yield lambda: [closure(), inner.first_step()]
    yield lambda: [closure(), inner.step()]


@pytest.mark.parametrize(
    "options", [{}, {"when": flatmin.optim.Adaptive(10)}, {"model": True}], ids=["", "adaptive", "model"]
)
@pytest.mark.parametrize("name", sorted(EVERY))
def test_inside_of_the_private_optimizer(name, options):
    if "when" in options and EVERY[name].max_passes == 1:
        pytest.skip("has no second pass")

    def base(net, lr):
        given = {"model": net} if "model" in options else options
        return EVERY[name](sgd(net), **given)

    private = Private(base=base)
    before = flat(private.net)
    for way in ways(private):
        with pytest.raises(InvalidArgumentError, match=f"^{name} .*without clipping, noise.*without {WHY}"):
            way()
        assert torch.equal(flat(private.net), before)
    private.module.cleanup()
    x, y = data()
    if not EVERY[name].per_sample_closure:
        inner = private.optimizer.original_optimizer

        def closure():
            inner.zero_grad()
            loss = F.cross_entropy(private.net(x), y)
            loss.backward()
            return loss

        inner.step(closure)
        assert not torch.equal(flat(private.net), before)


# Losses that mix samples.


def mixing(net):
    x, y = data()
    index = torch.arange(len(x))
    lowrank = flatmin.SAF(len(x), CLASSES, lag=1, start_epoch=0, history=flatmin.history.LowRank(rank=2))
    smoothing = flatmin.OnlineLabelSmoothing(CLASSES)
    share = flatmin.MESA(net, start_epoch=0, decay=0.9, fraction=0.5)
    some = flatmin.MESA(net, start_epoch=0, decay=0.9)
    return {
        "SAF with history LowRank": lambda logits: lowrank(logits, index),
        "OnlineLabelSmoothing": lambda logits: smoothing(logits, y),
        "MESA's mean over a fraction of the batch": lambda logits: share(logits, x),
        "MESA's mean over where": lambda logits: some(logits, x, where=y > 0),
    }


@pytest.mark.parametrize(("mode", "wrap"), MODES)
def test_losses_that_mix_samples(mode, wrap):
    losses = {}
    private = Private(mode, wrap, base=lambda net, lr: losses.update(mixing(net)) or sgd(net, lr))
    logits = private.call(data()[0])
    for what, loss in losses.items():
        with pytest.raises(InvalidArgumentError, match=f"^{what}.*gives no privacy"):
            loss(logits)
    private.module.cleanup()
    for loss in losses.values():
        assert loss(private.net(data()[0])) is not None


@pytest.mark.parametrize("wrap", [True, False])
def test_ghost_clipping_with_a_mean_over_the_batch(wrap):
    x, y = data()
    index = torch.arange(len(x))
    losses = {"squeezing": flatmin.logit_squeezing}

    def base(net, lr):
        saf, mesa = flatmin.SAF(len(x), CLASSES, lag=1, start_epoch=0), flatmin.MESA(net, start_epoch=0, decay=0.9)
        own = flatmin.MESA(net, start_epoch=0, decay=0.9, distance=F.mse_loss)
        epochs = iter(range(1, 9))

        def next_epoch(logits):
            saf.set_epoch(next(epochs))
            return saf(logits, index)

        saf(net(x), index)
        losses.update(saf=next_epoch, mesa=lambda logits: mesa(logits, x), distance=lambda logits: own(logits, x))
        return sgd(net, lr)

    Private("ghost", wrap, base=base)
    for name in losses:
        private = Private("ghost", wrap, base=base)
        before = flat(private.net)
        for _ in range(2):  # in the first step, and before any later one
            with pytest.raises(InvalidArgumentError, match=r"cannot clip a loss.*without privacy.*mode='hooks'"):
                logits = private.call(x)
                (private.criterion(logits, y) + losses[name](logits)).backward()
            private.module.enable_hooks()
        assert torch.equal(flat(private.net), before)


# What DPSAT cannot be attached to.


def attach(private, **changed):
    return DPSAT(**{"module": private.module, "optimizer": private.optimizer, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rho": 0.0}, "rho must be a finite number > 0"),
        ({"rho": float("inf")}, "rho must be a finite number > 0"),
        ({"direction": "gradients"}, "unknown direction 'gradients', did you mean gradient"),
        ({"scaling": 3}, "scaling must be"),
        ({"parameters": []}, "parameters is empty"),
        ({"parameters": [torch.zeros(3)]}, "parameters has a tensor of shape"),
        ({"module": None}, r"module must be what make_private returned, got NoneType.*make_private\("),
        ({"module": torch.nn.Linear(2, 2)}, "was not prepared by Opacus"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"optimizer \(SGD\) is none of Opacus'.*without privacy"),
    ],
)
def test_arguments(changed, message):
    with pytest.raises(InvalidArgumentError, match=message):
        attach(Private(), **changed)


def test_what_belongs_to_something_else():
    private, other = Private(), Private()
    with pytest.raises(InvalidArgumentError, match="lacks parameters of optimizer"):
        attach(private, module=other.module)
    attached = attach(private)
    with pytest.raises(InvalidArgumentError, match=r"has a DPSAT already: call its remove\(\)"):
        attach(private)
    attached.remove()
    attach(private)
    sam = Private(base=lambda net, lr: flatmin.SAM(sgd(net, lr)))
    with pytest.raises(InvalidArgumentError, match="is around SAM, whose passes would be without privacy"):
        attach(sam)
    parameter = next(other.net.parameters())
    parameter.device_mesh = "of a DTensor"
    with pytest.raises(InvalidArgumentError, match="not tried with sharded parameters"):
        attach(other)


def step_by_layers(private, x, y):
    hidden = x
    for layer in private.net:
        hidden = layer(hidden)
    return F.cross_entropy(hidden, y)


@pytest.mark.parametrize("before", [0, 2])
def test_a_step_whose_forward_pass_was_not_seen(before):
    private = Private()
    attach(private)
    private.fit(before)
    clean = flat(private.net)
    private.optimizer.zero_grad()
    step_by_layers(private, *data()).backward()
    with pytest.raises(InvalidArgumentError, match=r"seen no forward pass since the last step.*accounted.*left out"):
        private.optimizer.step()
    assert torch.equal(flat(private.net), clean)
    assert private.engine.accountant.history[-1][2] == before + 1
    private.fit(1)  # and goes on


def test_a_backward_pass_whose_weights_were_put_back():
    private = Private()
    attached = attach(private)
    private.fit(2)
    loss = F.cross_entropy(private.call(data()[0]), data()[1])
    attached.remove()
    with pytest.raises(InvalidArgumentError, match="put back: DPSAT was removed"):
        loss.backward()


def test_a_grad_scaler():
    private, scaler = Private(), torch.amp.GradScaler("cpu", init_scale=8.0)
    attach(private)
    private.optimizer.zero_grad()
    scaler.scale(private.criterion(private.call(data()[0]), data()[1])).backward()
    with pytest.raises(InvalidArgumentError, match=r"GradScaler.*bfloat16"):
        scaler.step(private.optimizer)


def test_a_state_of_the_other_form():
    private, other = Private(), Private()
    attach(private)
    attached = attach(other, direction="step")
    state = private.fit(2).optimizer.state_dict()
    with pytest.raises(StateDictError, match=r"direction='gradient'.*remove\(\)"):
        other.optimizer.load_state_dict(state)
    attached.remove()
    other.optimizer.load_state_dict(state)


def test_a_version_that_is_too_old_or_none(monkeypatch):
    monkeypatch.setattr(opacus, "__version__", "1.5.4")
    with pytest.raises(MissingDependencyError, match=r"1.5.4 is too old, 1.6 is needed; pip install"):
        _package.check_package()
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[opacus\]'"):
        _package.check_package()
