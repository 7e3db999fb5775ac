"""A problem that trains in milliseconds, and runs on it."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from flatmin.lab.methods import get_method, resolve_settings
from flatmin.lab.problems.problem import Problem, base_optimizer
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.training.trainer import Trainer

SOON = {"lag": 1, "start_epoch": 1, "ema_epochs": 1.0}  # trajectory losses at work from the second epoch on

EXPERIMENT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def _set(seed):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(dim=1))

def train_set():
    return _set(1)

def test_set():
    return _set(2)
"""


@pytest.fixture(autouse=True)
def _forked(forked_workers):
    """What a comparison starts is the same process either way, but for its beginning (see test_workers.py)."""


@pytest.fixture
def make_run():
    """Makes a run of a method whose trajectory loss, if any, acts soon."""

    def make(method="saf", *, seed=0, settings=None, epochs=3, batch_size=16, **recipe):
        recipe = Recipe(epochs=epochs, batch_size=batch_size, device="cpu", **recipe)
        found = get_method(method)
        soon = {name: value for name, value in SOON.items() if name in found.defaults}
        return Run(recipe, method, resolve_settings(found, {**soon, **(settings or {})}, epochs=epochs), seed)

    return make


@pytest.fixture
def make_problem():
    """Makes a problem of 40 images, 8x8, in 3 classes, with batch norm and dropout; 16 does not divide it."""

    def make(run):
        def images(seed):
            x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            return TensorDataset(x, x[:, 0, 0, :3].argmax(dim=1))

        def model():
            return nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
            )

        return Problem(
            images(2 * run.seed), images(2 * run.seed + 1), 3, model, None, lambda p: base_optimizer(run.recipe, p)
        )

    return make


@pytest.fixture
def make_trainer(make_run, make_problem):
    def make(method="saf", **options):
        run = make_run(method, **options)
        return Trainer(run, make_problem(run))

    return make


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The path of an experiment file that trains in milliseconds."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "tiny_experiment.py"
    path.write_text(EXPERIMENT)
    yield str(path)
    sys.modules.pop("tiny_experiment", None)
