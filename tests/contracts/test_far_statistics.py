"""One-pass methods say once that a network is evaluated with batch-norm statistics of weights far from its own."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning
from tests.contracts._one_pass import ONE_PASS

SAID = "moved by .*% of their length.*update_bn"
every = pytest.mark.parametrize("name", ONE_PASS)


class Run:
    """A network and its training, without a closure."""

    def __init__(self, name, rho=3.0, norm=None, **options):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(32, 4), torch.randint(3, (32,))
        norm = nn.BatchNorm1d(8) if norm is None else norm
        self.model = nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = getattr(flatmin, name)(base, rho=rho, model=self.model, **options)

    def train(self, steps=3):
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()

    def evaluate(self, gradients=False):
        self.model.eval()
        with torch.set_grad_enabled(gradients):
            return self.model(self.x)


@every
@pytest.mark.parametrize("gradients", [False, True])
def test_it_is_said_at_the_first_evaluation_and_once(name, gradients):
    run = Run(name)
    run.train()
    with pytest.warns(FlatminWarning, match=SAID) as said:
        run.evaluate(gradients)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate(gradients)
        run.train()
        run.evaluate(gradients)


@every
def test_statistics_made_anew_are_not_spoken_of_until_the_next_step(name):
    run = Run(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            run.train()
            torch.optim.swa_utils.update_bn([run.x], run.model)
            run.evaluate()
    run.train(1)
    with pytest.warns(FlatminWarning, match=SAID):
        run.evaluate()


@every
def test_a_copy_says_it_itself(name):
    run = Run(name)
    run.train()
    run.model, run.optimizer = copy.deepcopy((run.model, run.optimizer))
    run.train()
    with pytest.warns(FlatminWarning, match=SAID):
        run.evaluate()


QUIET = {
    "near": {"rho": 0.02},
    "no statistics": {"norm": nn.LayerNorm(8)},
    "the batch's own": {"norm": nn.BatchNorm1d(8, track_running_stats=False)},
    "a rho of another kind": {"scaling": flatmin.optim.Elementwise()},
}


@every
@pytest.mark.parametrize("what", QUIET)
def test_what_loses_nothing_is_not_spoken_of(name, what):
    run = Run(name, **copy.deepcopy(QUIET[what]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train()
        run.evaluate()


@every
def test_nor_is_a_network_that_was_not_trained(name):
    run = Run(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate()
