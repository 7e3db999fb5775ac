"""SAF and MESA under Opacus: a sample's loss is its own, so that clipping bounds what it changes."""

import copy
from unittest.mock import patch

import pytest

pytest.importorskip("opacus")

import torch
from opacus.grad_sample import GradSampleModule
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import flatmin
from flatmin import _privacy
from flatmin.integrations.opacus import DPSAT
from flatmin.losses import _mesa, _online_smoothing, _saf, trajectory_loss
from tests.integrations._opacus import CLASSES, N, Private, data, flat, network, quiet, sgd

FORMS = ["dense", "half", "int8", "int6", "int4", flatmin.history.TopK(2), "mean"]


@pytest.fixture(autouse=True)
def _quiet():
    quiet()


def saf(history):
    return flatmin.SAF(N, CLASSES, lag=None if history == "mean" else 1, start_epoch=0, history=history)


def moved(net):
    """Another network, so that there is something to compare with."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def gradient_of_first(loss, batch):
    """The gradient that Opacus takes of the first sample, in a batch with others."""
    loss, net = copy.deepcopy(loss), GradSampleModule(moved(network()))
    x, y = data()
    logits = net(x[batch])
    (F.cross_entropy(logits, y[batch]) + 3 * loss(logits, torch.tensor(batch))).backward()
    return torch.cat([parameter.grad_sample[0].flatten() for parameter in net.parameters()])


class Loss(torch.nn.Module):
    """One of flatmin's, as a function of logits and indices, after two epochs in which it has seen all samples."""

    def __init__(self, loss, call):
        super().__init__()
        self.loss, self.call = loss, call
        for epoch in range(3):
            loss.set_epoch(epoch)
            if epoch < 2 and not isinstance(loss, flatmin.MESA):
                call(loss, network()(data()[0]), torch.arange(N))

    def forward(self, logits, index):
        return self.call(self.loss, logits, index)


def mesa(**options):
    return flatmin.MESA(network(), start_epoch=0, decay=0.9, **options)


OWN = {str(history): lambda history=history: Loss(saf(history), lambda s, z, i: s(z, i)) for history in FORMS}
OWN["MESA"] = lambda: Loss(mesa(), lambda m, z, i: m(z, data()[0][i]))
MIXED = {
    "lowrank": lambda: Loss(saf(flatmin.history.LowRank(rank=1)), lambda s, z, i: s(z, i)),
    "smoothing": lambda: Loss(flatmin.OnlineLabelSmoothing(CLASSES), lambda s, z, i: s(z, data()[1][i])),
    "fraction": lambda: Loss(mesa(fraction=0.7), lambda m, z, i: m(z, data()[0][i])),
    "where": lambda: Loss(mesa(), lambda m, z, i: m(z, data()[0][i], where=i < 20)),
}


def change(loss, others=((1, 2, 3, 4, 5), (40, 41), (30, 31, 32), (7,))):
    """How much the gradient of a sample depends on which others are in the batch."""
    first, *rest = (gradient_of_first(loss, [0, *each]) for each in others)
    return max(float((first - each).norm() / first.norm()) for each in rest)


@pytest.mark.parametrize("name", OWN)
def test_the_gradient_of_a_sample_is_its_own(name):
    made = OWN[name]()
    assert change(made) < 1e-5
    plain = gradient_of_first(Loss(saf("dense"), lambda s, z, i: 0 * s(z, i)), [0, 1])
    assert float((gradient_of_first(made, [0, 1]) - plain).norm()) > 1e-3  # the loss does something


@pytest.mark.parametrize("name", ["fraction", "where"])
def test_that_of_a_loss_which_is_refused_is_not(name):
    with patch.object(_mesa, "check_unmixed"):
        assert change(MIXED[name]()) > 1e-2


@pytest.mark.parametrize("name", ["lowrank", "smoothing"])
def test_the_past_of_others_is_in_a_loss_that_is_refused(name):
    """The gradient of a sample, if another one was different in the epoch before."""
    with patch.object(_saf, "check_unmixed"), patch.object(_online_smoothing, "check_unmixed"):
        found = []
        for scale in (1.0, 10.0):
            x = data()[0].clone()
            x[30:] *= scale
            with patch(f"{__name__}.data", return_value=(x, data()[1])):
                found.append(gradient_of_first(MIXED[name](), [0, 1, 2]))
        assert float((found[0] - found[1]).norm()) > 1e-4


def test_ghost_clipping_would_not_bound_what_a_sample_adds_to_a_mean_over_the_batch():
    x, y = data()
    changes = []
    for mode in ("hooks", "ghost"):
        sums = []
        for first in (0, 1):  # with a sample that such a loss makes much of, and without it
            private, mask = Private(mode), torch.arange(first, N) == 0
            with patch.object(_privacy, "_check_clipped", return_value=None):
                logits = private.call(x[first:])
                extra = trajectory_loss(logits, -logits, temperature=1.0, mask=mask)
                (private.criterion(logits, y[first:]) + 1000 * extra).backward()
                private.optimizer.pre_step()
            sums.append(torch.cat([parameter.summed_grad.flatten() for parameter in private.net.parameters()]))
        changes.append(float((sums[0] - sums[1]).norm()))
    assert changes[0] < 1.001 < 10 < changes[1]  # it is to be 1 at most


@pytest.mark.parametrize("dpsat", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("kind", ["dense", "int8", "mean", "MESA", "squeezing"])
def test_epsilon_is_that_of_dpsgd(kind, mode, dpsat):
    made = {}

    def base(net, lr):
        made["mesa"] = flatmin.MESA(net, start_epoch=0, decay=0.9)
        return sgd(net, lr)

    private = Private(mode, base=base, dataset=flatmin.indexed(TensorDataset(*data())))
    if dpsat:
        DPSAT(module=private.module, optimizer=private.optimizer, rho=0.1)
    loss = made["mesa"] if kind == "MESA" else None if kind == "squeezing" else saf(kind)
    if kind == "MESA":
        loss.attach(private.optimizer)
    torch.manual_seed(3)
    values = []
    for epoch in range(2):
        if loss is not None:
            loss.set_epoch(epoch)
        for index, (x, y) in private.loader:
            private.optimizer.zero_grad()
            logits = private.call(x)
            if kind == "squeezing":
                extra = flatmin.logit_squeezing(logits)
            else:
                extra = loss(logits, x if kind == "MESA" else index)
            values.append(float(extra.detach()))
            (private.criterion(logits, y) + extra).backward()
            private.optimizer.step()
    assert values[-1] > 0
    assert private.epsilon() == Private().fit(8).epsilon()
    assert flat(private.net).isfinite().all()


def test_indices_over_the_private_loader_pass_empty_batches():
    private = Private(batch=1)
    torch.manual_seed(4)
    batches = list(flatmin.with_indices(private.loader))
    sizes = [len(index) for index, _ in batches]
    assert len(batches) == N
    assert 0 in sizes
    assert all(torch.equal(x, data()[0][index]) for index, (x, _) in batches)
    assert sizes != [1] * N
