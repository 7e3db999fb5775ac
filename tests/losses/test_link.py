"""Whether SAF and MESA notice that the criterion takes the logits for independent labels."""

import copy
import math
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.losses._comparison import Comparison
from flatmin.losses._link import _are_normalised, _has_margin

B, C = 32, 6
INDEX = torch.arange(B)


def labels(classes):
    return torch.randint(classes, (B,), generator=torch.Generator().manual_seed(1))


def yes_or_no(shape):
    return torch.bernoulli(torch.full(shape, 0.3), generator=torch.Generator().manual_seed(1))


def focal(logits, y):
    shares = logits.log_softmax(1).gather(1, y[:, None])
    return -((1 - shares.exp()) ** 2 * shares).mean()


ONE_OF_SEVERAL = {
    "cross entropy": lambda z: F.cross_entropy(z, labels(z.shape[1])),
    "smoothed, weighted": lambda z: F.cross_entropy(
        z, labels(z.shape[1]), label_smoothing=0.1, weight=torch.arange(1.0, z.shape[1] + 1, dtype=z.dtype)
    ),
    "soft labels": lambda z: F.cross_entropy(z, torch.rand(z.shape, dtype=z.dtype).softmax(1)),
    "focal": lambda z: focal(z, labels(z.shape[1])),
    "margin": lambda z: F.multi_margin_loss(z.float(), labels(z.shape[1])),
    "margin that grows": lambda z: F.cross_entropy(
        z - F.one_hot(labels(z.shape[1])) * (0.5 + 0.2 * z), labels(z.shape[1])
    ),
    "z loss": lambda z: F.cross_entropy(z, labels(z.shape[1])) + 1e-4 * z.logsumexp(1).square().mean(),
    "scaled as float16": lambda z: 65536.0 * F.cross_entropy(z, labels(z.shape[1])),
    "nothing": lambda z: 0 * z.sum(),
}
INDEPENDENT = {
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, yes_or_no(z.shape).to(z.dtype)),
    "binary, one label": lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(labels(z.shape[1])).to(z.dtype)),
    "regression": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "soft margin": lambda z: F.multilabel_soft_margin_loss(z, yes_or_no(z.shape).to(z.dtype)),
}


def losses(model):
    """Each loss by name, as a function of logits and inputs."""
    saf = flatmin.SAF(B, C, start_epoch=0, lag=1)
    found = {"SAF": (saf, lambda z, x: saf(z, INDEX))}
    for name, options in {"MESA": {}, "MESA, a share": {"fraction": 0.5}, "MESA, later": {"start_epoch": 2}}.items():
        mesa = flatmin.MESA(model, decay=0.9, **{"start_epoch": 0, **options})
        found[name] = mesa, lambda z, x, mesa=mesa: mesa(z, x)
    return found


NAMES = list(losses(nn.Linear(3, C)))


def said(name, criterion, *, dtype=torch.float32, passes=6, make=lambda: nn.Linear(3, C)) -> list[str]:
    torch.manual_seed(0)
    model = make().to(dtype)
    loss, term = losses(model)[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if isinstance(loss, flatmin.MESA):
        loss.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(passes):
            loss.set_epoch(epoch)
            x = torch.randn(B, 3, dtype=dtype)
            optimizer.zero_grad()
            logits = model(x)
            (criterion(logits) + term(logits, x)).backward()
            optimizer.step()
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(each.message) for each in caught if issubclass(each.category, FlatminWarning)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("criterion", INDEPENDENT)
def test_independent_labels_are_told_of_once(name, criterion):
    (message,) = said(name, INDEPENDENT[criterion])
    assert message.startswith(name.partition(",")[0])
    assert "link='sigmoid'" in message
    assert "distance=" in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("criterion", ONE_OF_SEVERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_is_said_of_a_softmax(name, criterion, dtype):
    assert said(name, ONE_OF_SEVERAL[criterion], dtype=dtype) == []


class Cosines(nn.Module):
    """Cosines of an angle to each class, which are multiplied here, or by the criterion."""

    def __init__(self, scale):
        super().__init__()
        self.body, self.layer, self.scale = nn.Linear(3, 64), nn.Linear(64, C, bias=False), scale

    def forward(self, x):
        return self.scale * F.linear(F.normalize(self.body(x), dim=1), F.normalize(self.layer.weight, dim=1))


ANGLES = {  # ArcFace, SphereFace, CosFace, and none: of the label's cosine
    "added to the angle": lambda cosine: torch.cos(torch.acos(cosine) + 0.5),
    "multiplied angle": lambda cosine: torch.cos(1.35 * torch.acos(cosine)),
    "taken from the cosine": lambda cosine: cosine - 0.35,
    "none": lambda cosine: cosine,
}


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_of_a_margin_on_cosines(angle, scale, name):
    y = labels(C)
    label = F.one_hot(y, C).bool()

    def criterion(z):
        cosine = (z / scale).clamp(-0.999, 0.999)
        return F.cross_entropy(30.0 * ANGLES[angle](cosine).where(label, cosine), y)

    assert said(name, criterion, make=lambda: Cosines(scale)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, torch.arange(1.0, C + 1)])
def test_nothing_is_said_of_logarithms_of_probabilities(name, dtype, weight):
    """They are logits too, and a likelihood moves that of the label alone."""
    weight = None if weight is None else weight.to(dtype)
    make = lambda: nn.Sequential(nn.Linear(3, C), nn.LogSoftmax(1))  # noqa: E731
    assert said(name, lambda z: F.nll_loss(z, labels(C), weight=weight), dtype=dtype, make=make) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nor_where_these_were_rounded_before(dtype):
    logits = (3 * torch.randn(B, 50, generator=torch.Generator().manual_seed(1))).log_softmax(1).to(dtype)
    assert logits.float().logsumexp(1).abs().max() > 1e-4
    assert _are_normalised(logits, 1)
    assert _are_normalised(logits.float(), 1)


@pytest.mark.parametrize("name", ["SAF", "MESA"])
@pytest.mark.parametrize("classes", [21, 100, 500])
def test_independent_labels_that_begin_as_shares_are_no_probabilities(name, classes, monkeypatch):
    """Where each class begins with the share of one among all, odds sum to nearly 1."""
    monkeypatch.setattr(sys.modules[__name__], "C", classes)

    def make():
        layer = nn.Linear(3, classes)
        nn.init.normal_(layer.weight, std=1e-4)
        nn.init.constant_(layer.bias, -math.log(classes - 1))
        return layer

    y = torch.bernoulli(torch.full((B, classes), 1.0 / classes), generator=torch.Generator().manual_seed(1))
    (message,) = said(name, lambda z: F.binary_cross_entropy_with_logits(z, y), make=make)
    assert "link='sigmoid'" in message


@pytest.mark.parametrize("prior", [-6.0, -2.0, 0.0, 2.0])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_one_label_by_independent_ones_is_no_margin(prior, spread):
    """Wherever the network begins, as long as it moves a sample's logits together."""
    logits = (prior + spread * torch.randn(B, 20, generator=torch.Generator().manual_seed(2))).requires_grad_()
    F.binary_cross_entropy_with_logits(logits, F.one_hot(labels(20), 20).float()).backward()
    assert logits.grad.sum(1).abs().sum() > 0.05 * logits.grad.abs().sum()
    assert not _has_margin(logits.detach(), logits.grad, 1)


@pytest.mark.parametrize("options", [{"link": "sigmoid"}, {"distance": "features"}])
def test_nothing_is_said_where_no_softmax_is_compared(options):
    model = nn.Linear(3, C)
    mesa = flatmin.MESA(model, decay=0.9, start_epoch=0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x = torch.randn(B, 3)
            logits = model(x)
            (INDEPENDENT["binary"](logits) + mesa(logits, x)).backward()
            mesa.update()
    assert caught == []


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("independent", [False, True])
def test_the_classes_may_be_any_dimension(class_dim, independent):
    compare = Comparison(output=None, class_dim=class_dim, link="softmax", distance=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            logits = torch.randn(2, 3, 4, requires_grad=True)
            compare.watch(logits)
            (logits.sigmoid().sum() if independent else logits.log_softmax(class_dim).square().sum()).backward()
    assert len(caught) == independent


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda saf: pickle.loads(pickle.dumps(saf))])
def test_a_copy_looks_too(clone):
    saf = flatmin.SAF(B, C)
    logits = torch.randn(B, C, requires_grad=True)
    (saf(logits, INDEX) + INDEPENDENT["binary"](logits)).backward()
    cloned = clone(saf)
    cloned.set_epoch(1)
    logits = torch.randn(B, C, requires_grad=True)
    (cloned(logits, INDEX) + INDEPENDENT["binary"](logits)).backward()
    for each in (cloned, saf):
        each.set_epoch(2)
        with pytest.warns(FlatminWarning, match="link='sigmoid'"):
            each(torch.randn(B, C, requires_grad=True), INDEX)
