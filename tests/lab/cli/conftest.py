"""The command, called in this process, in an empty folder, on a problem that trains in milliseconds."""

import signal
import sys
from types import SimpleNamespace

import pytest

from flatmin.lab import cli

EXPERIMENT = {
    "imports": "import torch\nfrom torch import nn\nfrom torch.utils.data import TensorDataset",
    "model": "def model(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))",
    "data": "def _set(seed):\n"
    "    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))\n"
    "    return TensorDataset(x, x[:, :3].argmax(dim=1))",
    "train_set": "def train_set(): return _set(1)",
    "test_set": "def test_set(): return _set(2)",
}


@pytest.fixture
def flatmin(tmp_path, monkeypatch, capsys):
    """Calls the command and returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def call(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment file; parts of it can be given, or left out with an empty string."""

    def write(**parts):
        path = tmp_path / "tiny_experiment.py"
        path.write_text("\n".join({**EXPERIMENT, **parts}.values()))
        return path.name

    yield write
    sys.modules.pop("tiny_experiment", None)
