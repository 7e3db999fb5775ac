"""No step of a loss makes the host wait for the accelerator."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.history import TopK
from flatmin.history._choose import CODECS
from tests.host_reads import DEVICE, HostReadError, HostReads

N, C, B = 24, 100, 12


def make(name: str, model: nn.Module):
    """A loss and its optimizer-side hook: a function of epoch, logits, inputs, labels and index."""
    if name in CODECS:
        saf = flatmin.SAF(N, C, start_epoch=1, history=name, **({} if name == "mean" else {"lag": 2}))
        return saf, lambda z, x, y, i: saf(z, i)
    if name == "logit_squeezing":
        return None, lambda z, x, y, i: flatmin.logit_squeezing(z)
    if name == "OnlineLabelSmoothing":
        smoothing = flatmin.OnlineLabelSmoothing(C)
        return smoothing, lambda z, x, y, i: smoothing(z, y)
    mesa = flatmin.MESA(model, decay=0.9, start_epoch=1, **({"fraction": 0.5} if "fraction" in name else {}))
    return mesa, lambda z, x, y, i: mesa(z, x)


NAMES = [*CODECS, "logit_squeezing", "OnlineLabelSmoothing", "MESA", "MESA, fraction"]


def trained(name: str, accelerator: HostReads | None) -> list[float]:
    """The losses of four epochs, on the CPU or on what passes for an accelerator."""
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if accelerator is None else tensor.to(DEVICE, non_blocking=True)

    if accelerator is not None:
        model.to(DEVICE)
    loss, term = make(name, model)
    if accelerator is not None and loss is not None:
        loss.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if isinstance(loss, flatmin.MESA):
        loss.attach(optimizer)
    losses = []
    for epoch in range(4):
        if loss is not None:
            loss.set_epoch(epoch)
        for index in torch.randperm(N, generator=random).split(B):
            if epoch == 3:
                index[-1] = index[0]
            x, y = there(torch.randn(B, 5, generator=random)), there(torch.randint(C, (B,), generator=random))
            optimizer.zero_grad()
            with torch.enable_grad() if accelerator is None else accelerator.refused():
                logits = model(x)
                value = term(logits, x, y, index)
                (F.cross_entropy(logits, y) + value).backward()
                optimizer.step()
            losses.append(float(value.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_and_gives_what_the_cpu_gives(name):
    with HostReads() as accelerator:
        there = trained(name, accelerator)
    assert there == trained(name, None)
    assert there[-1] != 0


READS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "index on the host": lambda x: x[torch.tensor([0])],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "element": lambda x: x.__setitem__(0, 1.0),
    "unique": lambda x: x.unique(),
    "multinomial": lambda x: x.multinomial(1),
    "histc": lambda x: x.histc(),
    "mode": lambda x: x.mode(),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
}


@pytest.mark.parametrize("how", READS)
def test_what_waits_is_noticed(how):
    with HostReads() as accelerator:
        x = torch.ones(3).to(DEVICE)
        READS[how](x)
        with accelerator.refused(), pytest.raises(HostReadError):
            READS[how](x)
        with accelerator.refused():
            x.mul_(2).add_(torch.zeros_like(x)).fill_(1.0)
            torch.ones(3).to(x.device, non_blocking=True)


class Reads(TopK):
    """A codec that reads a number from the device."""

    def encode(self, logits):
        float(logits.sum())
        return super().encode(logits)


def test_a_read_put_into_a_step_fails_the_test(monkeypatch):
    monkeypatch.setitem(CODECS, "topk", Reads())
    with HostReads() as accelerator, pytest.raises(HostReadError):
        trained("topk", accelerator)
    assert trained("topk", None)


def test_basis_is_begun_without_assigning_to_an_element(monkeypatch):
    from flatmin.history import LowRank

    plain = LowRank.begin_epoch

    def assigns(self, epoch):
        plain(self, epoch)
        self.basis_epochs[0] = 3

    monkeypatch.setattr(LowRank, "begin_epoch", assigns)
    with HostReads() as accelerator, pytest.raises(HostReadError):
        trained("lowrank", accelerator)
