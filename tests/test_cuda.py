"""On a GPU: the same as on the CPU, and no step makes the host wait. Run these first wherever there is one.

    pytest -n0 tests/test_cuda.py

Elsewhere they are left out; ``FLATMIN_TEST_DEVICE=cpu`` runs them there, to see that they are right themselves.
"""

import contextlib
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.history._choose import CODECS
from flatmin.lab.methods import get_method, resolve_settings
from flatmin.lab.problems.load import load_problem
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.training.trainer import Trainer
from tests.contracts._optimizers import EVERY

DEVICE = torch.device(os.environ.get("FLATMIN_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here; FLATMIN_TEST_DEVICE=cpu"
)
CPU = torch.device("cpu")
N, C, B = 256, 100, 32


@contextlib.contextmanager
def refused():
    """Inside, what makes the host wait raises."""
    if DEVICE.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32, 10))


def batch(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(B, 3, 8, 8, generator=random).to(device, dtype)
    return x, torch.randint(10, (B,), generator=random).to(device)


@pytest.mark.parametrize("place", ["device", "host", "path"])
@pytest.mark.parametrize("form", CODECS)
def test_saf(form, place, tmp_path):
    where = {"device": {}, "host": {"location": "host"}, "path": {"path": tmp_path}}[place]
    lag = {} if form == "mean" else {"lag": 2}
    there = flatmin.SAF(N, C, start_epoch=1, history=form, **lag, **where).to(DEVICE)
    here = flatmin.SAF(N, C, start_epoch=1, history=form, **lag)
    random = torch.Generator().manual_seed(0)
    usual = torch.randn(N, C, generator=random) * 3
    for epoch in range(6):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        for number, index in enumerate(torch.randperm(N, generator=random).split(B)):
            index[-1] = index[0]  # once is not checked by the fast path alone
            z = usual[index] + 0.3 * torch.randn(len(index), C, generator=random)
            a, b = z.clone().requires_grad_(), z.to(DEVICE).requires_grad_()
            ours = here(a, index)
            with refused() if epoch > 2 and number > 0 else contextlib.nullcontext():
                theirs = there(b, index)
                if theirs.requires_grad:
                    theirs.backward()
            if ours.requires_grad:
                ours.backward()
                exact = form in ("dense", "half", "int8", "int6", "mean")  # others differ where a rounding does
                close = {"rtol": 1e-3, "atol": 1e-5} if exact else {"rtol": 0.2, "atol": 1e-2}
                torch.testing.assert_close(theirs.detach().cpu(), ours.detach(), **close)
                torch.testing.assert_close(b.grad.cpu(), a.grad, **close)


WAYS = [{}, {"fraction": 0.5}, {"statistics": "batch"}]


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_recorded_average_gives_the_same_and_owns_its_memory(options, precision, prepare):
    """Between two steps all memory that is free is filled with NaN, which a graph that lost its own would read."""
    x, y = batch(DEVICE)

    def losses(capture):
        model = network().to(DEVICE, memory_format=torch.channels_last)
        mesa = flatmin.MESA(model, start_epoch=0, decay=0.9, capture=capture, **options)
        mesa._calls.seed = 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        mesa.attach(optimizer)
        found = []
        for step in range(12):
            waste = [torch.full((size,), float("nan"), device=DEVICE) for size in (16, 400, 3000, 100_000) * 8]
            del waste
            optimizer.zero_grad()
            late = step > 6 and DEVICE.type == "cuda"
            with refused() if late else contextlib.nullcontext():
                with torch.autocast(DEVICE.type, precision or torch.bfloat16, enabled=precision is not None):
                    if prepare:
                        mesa.prepare(x)
                    logits = model(x)
                    penalty = mesa(logits, x)
                (F.cross_entropy(logits.float(), y) + penalty).backward()
                optimizer.step()
            found.append(penalty.detach())
        if capture is None and DEVICE.type == "cuda":
            assert mesa._captured._graphs, mesa._captured._why
        return [float(each) for each in found]

    assert losses(None) == pytest.approx(losses(False), rel=0.02, abs=1e-5)


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", EVERY)
def test_optimizers(name, base):
    """Steps as on the CPU, no waits, and of a step that is not finite nothing is left."""

    def trained(device, steps, infinite=None):
        model = network().to(device, torch.float64)
        optimizer = EVERY[name](BASES[base](model.parameters()), rho=0.05)
        x, y = batch(device, torch.float64)

        def losses(keep):
            return F.cross_entropy(model(x[keep]), y[keep], reduction="none") * factor

        def closure():
            optimizer.zero_grad()
            loss = losses(slice(None)).mean()
            loss.backward()
            return loss

        for step in range(steps):
            factor = float("inf") if step == infinite else 1.0
            quiet = step > 2 and infinite is None and device == DEVICE
            with refused() if quiet else contextlib.nullcontext():
                optimizer.step(losses if optimizer.per_sample_closure else closure)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", flatmin.errors.NonFiniteGradientWarning)
            assert optimizer.skipped_steps == (infinite is not None)
        state = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        return [each.detach().cpu().clone() for each in (*model.state_dict().values(), *state)]

    there = trained(DEVICE, 8)
    for ours, theirs in zip(trained(CPU, 8), there, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flatmin.errors.NonFiniteGradientWarning)
        dropped = trained(DEVICE, 9, infinite=8)
    for ours, theirs in zip(there, dropped, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["base", "saf", "mesa", "sam", "msam", "ema"])
def test_the_command_trains_without_waiting(method, compiled):
    if compiled and DEVICE.type != "cuda":
        pytest.skip("inductor's compiler for the CPU is slow")
    recipe = Recipe(
        data="digits", model="cnn", epochs=3, crop=True, precision="bfloat16", device=DEVICE.type, compile=compiled
    )
    settings = {"start_epoch": 0} if method in ("saf", "mesa") else {}
    settings |= {"lag": 1} if method == "saf" else {"rho": 0.1} if method == "msam" else {}
    chosen = resolve_settings(get_method(method), settings, epochs=recipe.epochs)
    trainer = Trainer(Run(recipe, method, chosen), load_problem(recipe, seed=0))
    first = trainer.train_epoch()
    step = trainer.stepping.step

    def watched(index, *args, **kwargs):
        known = trainer.progress.steps > 4 and len(index) == recipe.batch_size
        with refused() if known else contextlib.nullcontext():
            return step(index, *args, **kwargs)

    trainer.stepping.step = watched
    trainer.train_epoch()
    last = trainer.train_epoch()
    assert last["train_loss_vanilla"] < first["train_loss_vanilla"]
