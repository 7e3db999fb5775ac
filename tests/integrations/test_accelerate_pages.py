"""What docs/plug-in/accelerate.md says can be run, and so can the example."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

import accelerate
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.integrations._accelerate import data, difference, network, reset, sgd

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _reset(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    yield
    reset()


def test_the_code_trains():
    section = (ROOT / "docs" / "plug-in" / "accelerate.md").read_text()
    blocks = [block.partition("```")[0] for block in section.split("```python\n")[1:]]
    assert len(blocks) == 1
    net = network()
    names = {
        "F": F,
        "flatmin": flatmin,
        "model": net,
        "base": sgd(net),
        "loader": DataLoader(TensorDataset(*data()), 16),
    }
    exec(blocks[0], names)
    assert isinstance(names["accelerator"], accelerate.Accelerator)
    assert names["optimizer"].state_dict()["flatmin"]["step"] == 3
    assert float(names["loss"]) > 0
    assert difference(net, network()) > 1e-2


@pytest.mark.parametrize("method", ["sam", "mesa"])
def test_the_example_learns(method):
    spec = importlib.util.spec_from_file_location("accelerate_digits", ROOT / "examples" / "accelerate_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(method, epochs=6) > 0.85
    assert torch.is_grad_enabled()
