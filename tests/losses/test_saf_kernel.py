"""SAF's kernel against the plain operations and a float64 oracle: interpreted on the CPU, compiled on a GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.history import Dense
from flatmin.losses import _fused

pytest.importorskip("triton", reason="Triton, which the kernel is written in, comes with flatmin[dev] on Linux")
pytestmark = pytest.mark.filterwarnings("error")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS: dict[str, Any] = {
    "dense": "dense",
    "half": "half",
    "int8": "int8",
    "int6": "int6",
    "int4": "int4",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N, COEFFICIENT, TEMPERATURE = 5, 0.7, 3.0


@pytest.fixture
def launches(monkeypatch):
    """Lets the kernel run where the tests do, and notes each launch."""
    noted: list[Any] = []
    plain = _fused._launch

    def note(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        noted.append(lambda: plain(*args, **kwargs))

    monkeypatch.setattr(_fused, "KERNEL_DEVICES", {"cuda", DEVICE})
    monkeypatch.setattr(_fused, "_launch", note)
    monkeypatch.setattr(_fused, "_broken", False)
    with numpy.errstate(all="ignore"):  # the interpreter's, which calculates with infinities where the kernel may
        yield noted


def make(form: Any, num_classes: int, **kwargs: Any) -> flatmin.SAF:
    kwargs = {"lag": 2, "start_epoch": 0, **kwargs}
    return flatmin.SAF(N, num_classes, history=form, coefficient=COEFFICIENT, temperature=TEMPERATURE, **kwargs).to(
        DEVICE
    )


def oracle(logits: Tensor, past: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float64, from the paper's equation 8."""
    z = logits.detach().double().clamp(min=-1e5).requires_grad_()
    p, q = (each / TEMPERATURE for each in (past.double().clamp(min=-1e5), z))
    p, q = p - p.logsumexp(1, keepdim=True), q - q.logsumexp(1, keepdim=True)
    loss = COEFFICIENT * TEMPERATURE**2 / len(z) * (p.exp() * (p - q)).sum(1)[there].sum()
    (gradient,) = torch.autograd.grad(loss, z)
    return loss, gradient


def decoded(saf: flatmin.SAF) -> Tensor:
    """All rows, by epoch of the lag and sample."""
    rows = saf.history.store.rows
    codec = saf.history.codec
    return torch.stack(
        [codec.decode(each, 0, each.new_zeros(N, saf.num_classes, dtype=torch.float32)) for each in rows]
    )


def batches(num_classes: int, epochs: int, size: int, seed: int = 0):
    """Logits and indices by epoch: missing samples, a masked class, a sample that occurs twice, one not finite."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(N, num_classes, generator=random) * 3
    if num_classes > 2:
        centre[1::2, num_classes // 2] = -torch.inf  # some samples have no such class
    for epoch in range(epochs):
        index = torch.randperm(N, generator=random)[:size]
        if epoch == epochs - 1 and size > 2:
            index[-1] = index[0]
        logits = centre[index] + torch.randn(size, num_classes, generator=random)
        if epoch == 1 and epochs > 2 and size > 2:
            logits[1, 0] = torch.nan
        yield epoch, index, logits


def agree(form: Any, num_classes: int, dtype: torch.dtype, epochs: int, size: int, monkeypatch, **kwargs: Any) -> int:
    """Runs both paths; returns how many rows were compared."""
    fused, plain = make(form, num_classes, **kwargs), make(form, num_classes, **kwargs)
    compared = 0
    for epoch, index, logits in batches(num_classes, epochs, size):
        a, b = (logits.to(DEVICE, dtype, copy=True).requires_grad_() for _ in range(2))
        for saf in (fused, plain):
            saf.set_epoch(epoch)
        slot = epoch % fused.lag
        past = decoded(plain)[slot, index]
        first = torch.tensor([int(i) not in index[:k].tolist() for k, i in enumerate(index)])
        there = (plain.history.store.epochs[slot, index].cpu() == epoch - fused.lag) & first & (epoch >= fused.lag)
        loss = fused(a, index)
        with monkeypatch.context() as off:
            off.setattr(_fused, "KERNEL_DEVICES", set())
            expected = plain(b, index)
        assert loss.dtype == expected.dtype == torch.float32
        assert loss.requires_grad == expected.requires_grad == (epoch >= fused.lag)
        exactly = {"rtol": 2e-5 if num_classes < 10_000 else 2e-4, "atol": 1e-6}
        torch.testing.assert_close(loss, expected, **exactly)
        if loss.requires_grad:
            loss.backward()
            expected.backward()
            exact, gradient = oracle(a, past, there.to(DEVICE))
            torch.testing.assert_close(loss.double(), exact, **exactly)
            assert a.grad.dtype == dtype
            precise = max(1e-5, torch.finfo(dtype).eps)
            largest = float(gradient.abs().max())
            torch.testing.assert_close(a.grad.double(), gradient, rtol=precise, atol=max(precise * largest, 1e-7))
            torch.testing.assert_close(a.grad, b.grad, rtol=2 * precise, atol=max(precise * largest, 1e-7))
            compared += int(there.sum())
        assert torch.equal(fused.history.store.epochs, plain.history.store.epochs)
        assert torch.equal(decoded(fused), decoded(plain))
    return compared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_is_the_plain_step(form, dtype, launches, monkeypatch):
    assert agree(FORMS[form], 33, dtype, epochs=4, size=3, monkeypatch=monkeypatch) >= 2
    assert len(launches) == 4


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_every_number_of_classes(form, num_classes, launches, monkeypatch):
    if num_classes == 1000:
        monkeypatch.setattr(_fused, "BLOCK", 512)  # two blocks, and the last one not full
    assert agree(FORMS[form], num_classes, torch.float32, epochs=2, size=3, monkeypatch=monkeypatch, lag=1) >= 1


@pytest.mark.parametrize("form", ["dense", "int6"])
def test_32000_classes(form, launches, monkeypatch):
    assert agree(form, 32_000, torch.bfloat16, epochs=2, size=3, monkeypatch=monkeypatch, lag=1) > 0


EXTREMES = {
    "infinite": [torch.inf, 0.0, 1.0],
    "all masked": [-torch.inf] * 3,
    "not a number": [0.0, torch.nan, -torch.inf],
    "far apart": [1e20, -1e20, 0.0],
    "beyond the range": [0.0, -99.9, -1e4],
    "flat": [0.0, 0.0, 0.0],
    "tiny steps": [0.0, 1e-6, 2e-6],
}


@pytest.mark.parametrize("then", EXTREMES)
def test_extreme_logits_give_what_the_plain_step_gives(then, launches, monkeypatch):
    usual = [[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]
    for form in ("dense", "half", "int6"):
        fused, plain = make(form, 3, lag=1), make(form, 3, lag=1)
        for epoch, rows in enumerate([[EXTREMES[then], *usual], [usual[0], EXTREMES[then], usual[1]]]):
            a, b = (torch.tensor(rows, device=DEVICE).requires_grad_() for _ in range(2))
            fused.set_epoch(epoch), plain.set_epoch(epoch)
            x = fused(a, torch.arange(3))
            with monkeypatch.context() as off:
                off.setattr(_fused, "KERNEL_DEVICES", set())
                y = plain(b, torch.arange(3))
            torch.testing.assert_close(x, y, equal_nan=True)
        (x * 3).backward(), (y * 3).backward()
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
        assert torch.equal(decoded(fused), decoded(plain))
        assert torch.equal(fused.history.store.epochs, plain.history.store.epochs)
    assert len(launches) == 6


def ready(form: Any = "dense", **kwargs: Any) -> tuple[flatmin.SAF, Tensor, Tensor]:
    """SAF with a past, new logits and their index."""
    saf = make(form, 10, lag=1, **kwargs)
    index, random = torch.tensor([4, 1, 2]), torch.Generator().manual_seed(0)
    saf(torch.randn(3, 10, generator=random).to(DEVICE).requires_grad_(), index)
    saf.set_epoch(1)
    return saf, torch.randn(3, 10, generator=random).to(DEVICE), index


def test_a_scale_reaches_float16_gradients_before_they_are_rounded(launches):
    for scale in (2.0**-12, 2.0**12):
        saf, logits, index = ready()
        half = logits.half().requires_grad_()
        (saf(half, index) * scale).backward()
        saf, _, _ = ready()
        single = logits.half().float().requires_grad_()
        (saf(single, index) * scale).backward()
        assert torch.equal(half.grad, single.grad.half())
        assert launches


def test_strided_logits_are_read_where_they_are(launches):
    saf, logits, index = ready()
    expected = saf(logits.requires_grad_(), index)
    saf, _, _ = ready()
    assert torch.equal(saf(logits.detach().T.contiguous().T.requires_grad_(), index), expected)
    saf, _, _ = ready()
    assert torch.equal(saf(logits.detach().repeat(1, 2).requires_grad_()[:, :10], index), expected)
    assert len(launches) == 6


def test_second_derivatives_are_those_of_the_plain_step(launches, monkeypatch):
    found = []
    for devices in ({DEVICE}, set()):
        monkeypatch.setattr(_fused, "KERNEL_DEVICES", devices)
        saf, logits, index = ready()
        logits[0, 3] = -torch.inf
        index[1] = 3  # has no past
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(saf(logits, index) ** 2, logits, create_graph=True)
        found.append((gradient.detach(), *torch.autograd.grad((gradient**2).sum(), logits)))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    assert len(launches) == 2


def test_it_compiles_for_gpus(tmp_path):
    """The interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(Path(__file__).with_name("compile_kernel.py"))]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["15", "kernels"]


def test_launching_again_after_set_epoch_is_a_step_of_that_epoch(launches):
    saf, logits, index = ready()
    saf(logits.requires_grad_(), index)
    saf.set_epoch(2)
    launches[-1]()  # as a CUDA graph replays it
    assert saf.history.store.epochs[0, index].tolist() == [2, 2, 2]
    assert saf.history.store.epochs[0].max() == 2


def test_a_graph_that_would_go_stale_is_refused(launches, monkeypatch):
    saf, logits, index = ready()
    monkeypatch.setattr(_fused, "capturing", lambda device: True)
    assert saf(logits.requires_grad_(), index.to(DEVICE)).requires_grad
    new = make("dense", 10)
    with pytest.raises(InvalidArgumentError, match="warm up"):
        new(logits, index.to(DEVICE))
    with pytest.raises(InvalidArgumentError, match="for good"):
        make("topk" if DEVICE == "cuda" else "mean", 30 if DEVICE == "cuda" else 10, lag=None)(logits, index.to(DEVICE))


def test_a_kernel_that_fails_is_said_once_and_replaced(launches, monkeypatch):
    def fails(*args: Any, **kwargs: Any) -> None:
        try:
            raise RuntimeError("no compiler\nfound")
        except RuntimeError as error:
            raise TypeError("at 81:23:\n  a line") from error

    expected = ready()
    monkeypatch.setattr(_fused, "_launch", fails)
    with pytest.warns(FlatminWarning, match="RuntimeError: no compiler.: its plain operations") as said:
        saf, logits, index = ready()
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = saf(logits.requires_grad_(), index)
    torch.testing.assert_close(value, expected[0](expected[1].requires_grad_(), expected[2]))


def test_without_triton_the_plain_operations_run(launches, monkeypatch):
    monkeypatch.setattr(_fused, "_kernel", lambda: None)
    saf, logits, index = ready()
    assert saf(logits.requires_grad_(), index) > 0
    assert not launches


PLAIN = {
    "topk": {"form": flatmin.history.TopK(3)},
    "lowrank": {"form": flatmin.history.LowRank(3)},
    "mean": {"form": "mean", "lag": None},
    "momentum": {"momentum": 0.5, "lag": None},
    "host": {"location": "host"},
    "float64": {"form": Dense(torch.float64)},
}


@pytest.mark.parametrize("what", PLAIN)
def test_what_the_kernel_does_not_know_takes_the_plain_operations(what, launches):
    kwargs = {"form": "dense", "lag": 1, **PLAIN[what]}
    saf = make(kwargs.pop("form"), 10, **kwargs)
    saf(torch.zeros(3, 10, device=DEVICE, requires_grad=True), torch.arange(3))
    assert not launches


def test_an_empty_batch_and_float64_logits_take_the_plain_operations(launches):
    saf, logits, index = ready()
    before = len(launches)
    assert saf(logits.requires_grad_()[:0], index[:0]) == 0
    assert saf(logits.detach().double().requires_grad_(), index).dtype == torch.float64
    assert len(launches) == before
