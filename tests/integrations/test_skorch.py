"""The example of skorch: its step is SAM's, and it learns."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("skorch")
pytest.importorskip("accelerate")  # of which the tests' network and data are

import torch
from skorch import NeuralNetClassifier
from torch import nn
from torch.nn import functional as F

import flatmin
from tests.integrations._accelerate import EPOCHS, B, data, difference, network, sgd


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "skorch_digits.py"
    spec = importlib.util.spec_from_file_location("skorch_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns(example):
    assert example.main(epochs=6) > 0.85


def test_the_steps_are_those_of_an_own_loop(example):
    options = {"criterion": nn.CrossEntropyLoss, "optimizer": example.sam, "lr": 0.1, "batch_size": B}
    net = NeuralNetClassifier(network(norm=True), max_epochs=EPOCHS, train_split=None, verbose=0, **options)
    x, y = data()
    net.fit(x, y)
    other = network(norm=True)
    optimizer = flatmin.SAM(sgd(other), rho=0.05)
    losses = []
    for _ in range(EPOCHS):
        for x_, y_ in zip(x.split(B), y.split(B), strict=True):

            def closure(x_=x_, y_=y_):
                optimizer.zero_grad()
                loss = F.cross_entropy(other(x_), y_)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item() * len(x_))
    assert difference(net.module_, other) < 1e-6
    assert difference(other, network(norm=True)) > 1e-2
    shown = net.history[:, "train_loss"]
    assert shown[-1] == pytest.approx(sum(losses[len(losses) // 2 :]) / len(x), rel=1e-5)  # of the first passes
    assert torch.is_grad_enabled()
