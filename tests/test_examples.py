"""The examples do what the documentation says of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin as flatmin_library
from flatmin.lab import cli
from tests.integrations._timm import importable

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flatmin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda *arguments: cli.run([str(argument) for argument in arguments])
    sys.modules.pop("my_experiment", None)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


METHODS = ["logit_squeezing", "saf", "mesa", "sam"]


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_of_ones_own_learns_with_every_method(own_loop, capsys, method):
    accuracy = own_loop.main(method, epochs=12)
    lines = capsys.readouterr().out.splitlines()
    assert accuracy > 0.9
    assert [line.split(":")[0] for line in lines] == ["epoch 10", "epoch 12"]
    assert lines[-1] == f"epoch 12: test accuracy {100 * accuracy:.2f} %"


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_of_the_loop_differ(own_loop, monkeypatch, method):
    """The penalty or the wrapper is at work: without it every method would be the same run."""
    calls = []
    for name in ("SAF", "MESA"):
        kind = getattr(own_loop.flatmin, name)
        monkeypatch.setattr(kind, "forward", noting(kind.forward, calls, name.lower()))
    squeezing = own_loop.flatmin.logit_squeezing
    monkeypatch.setattr(own_loop.flatmin, "logit_squeezing", noting(squeezing, calls, "logit_squeezing"))
    network = own_loop.models.SmallCNN
    passes = []
    monkeypatch.setattr(network, "forward", noting(network.forward, passes, "pass"))
    own_loop.main(method, epochs=1)
    assert calls == ([] if method == "sam" else [method] * 8)
    assert len(passes) == (16 if method == "sam" else 8) + 1  # and the evaluation


def test_timms_network_learns_with_both_methods(monkeypatch):
    calls = []
    monkeypatch.setattr(flatmin_library.MSAM, "move", noting(flatmin_library.MSAM.move, calls, "msam"))
    monkeypatch.setattr(flatmin_library.MESA, "forward", noting(flatmin_library.MESA.forward, calls, "mesa"))
    with importable():
        spec = importlib.util.spec_from_file_location("timm_digits", EXAMPLES / "timm_digits.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main(["msam", "mesa"], epochs=3) > 0.8
    assert (calls.count("msam"), calls.count("mesa")) == (57, 57)


def noting(function, calls, name):
    def noted(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return noted


def test_the_loop_has_a_command_line():
    found = subprocess.run([sys.executable, EXAMPLES / "own_loop.py", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "{logit_squeezing,saf,mesa,sam}" in found.stdout


def test_the_experiment_file_trains(flatmin, capsys):
    assert flatmin("train", EXAMPLES / "my_experiment.py", "--method", "saf", "--epochs", 10, "--out", "run") == 0
    assert capsys.readouterr().err == ""
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] > 0.93
    assert last["train_loss"] > last["train_loss_vanilla"]
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first["lr"] == 0.003  # its own optimizer


def test_the_experiment_file_is_compared(flatmin, capsys):
    options = ["--methods", "base,smoothing,mesa", "--epochs", 8, "--seeds", 2, "--minutes", 0.1, "--jobs", 1]
    assert flatmin("compare", EXAMPLES / "my_experiment.py", *options, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "my_experiment.py: 2 seeds, 8 epochs" in out
    assert "2 finished seeds: too few for a claim" in out
    rows = json.loads(Path("run/results.json").read_text())["rows"]
    assert all(min(row["test_accuracy"]) > 90 for row in rows)
