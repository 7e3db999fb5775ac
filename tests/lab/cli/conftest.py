"""The command, called in this process, in an empty folder, on a problem that trains in milliseconds."""

import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest

from flatmin import lab
from flatmin.lab import cli
from flatmin.lab.runs.train import RunInterrupted

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


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A run that was ended after the second of its three epochs, in a folder with its experiment file."""
    place, done = tmp_path_factory.mktemp("template"), []
    (place / "tiny_experiment.py").write_text("\n".join(EXPERIMENT.values()))

    def end(metrics):
        done.append(metrics)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", [*sys.path])
        recipe = lab.Recipe(experiment="tiny_experiment.py", epochs=3, batch_size=16, device="cpu")
        with pytest.raises(RunInterrupted):
            lab.train(recipe, method="sam", out="run", on_epoch=end)
    sys.modules.pop("tiny_experiment", None)
    return place


@pytest.fixture
def begun(flatmin, template, tmp_path, monkeypatch):
    """Makes the folder ``run`` of a run with one epoch to go, again at each call, and its experiment file beside it."""
    shutil.copy(template / "tiny_experiment.py", tmp_path)
    # Waiting for the disk is most of the time of a small run, and Plotly's script that of a page.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")

    def make():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return shutil.copytree(template / "run", tmp_path / "run")

    yield make
    for name in ("tiny_experiment", "experiment"):
        sys.modules.pop(name, None)


def fails_in_one_line(found, *said):
    """Checks that the command has failed, and ended with one line of its own that says this."""
    assert found.code == 2, found.out
    *progress, line = found.err.splitlines()
    assert line.startswith("flatmin: ")
    assert not any(each.startswith(("flatmin: ", "Traceback")) for each in progress)
    assert len(line) < 1500
    for text in said:
        assert text in line
