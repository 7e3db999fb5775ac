"""A method that an experiment file registers takes part in everything, in this process and in others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flatmin.lab.runs.saved import open_saved
from tests import fresh
from tests.registry import restored

METHODS = """
import functools
from flatmin.lab import methods

def _squared(given, settings, *, sign=1):
    def penalty(logits, y, index, inputs):
        return sign * settings["strength"] * logits.square().mean()
    return methods.Assembled(given.optimizer, penalty=penalty)

class _TwiceTheGradient(torch.optim.Optimizer):
    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base, self.param_groups, self.state = base, base.param_groups, base.state

    def step(self, closure):
        loss = closure()
        closure()
        self.base.step()
        return loss

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)

def _twice(given, settings):
    return methods.Assembled(_TwiceTheGradient(given.optimizer))

methods.register(methods.Card("squared", "small logits", {"strength": 0.1, "form": "plain"}, _squared))
methods.register(methods.Card("opposite", "large logits", {"strength": 0.1}, functools.partial(_squared, sign=-1)))
methods.register(methods.Card("twice", "two gradients", {}, _twice, closure_calls=2))
"""


@pytest.fixture(autouse=True)
def registry():
    with restored():
        yield


@pytest.fixture
def path(experiment):
    return experiment(methods=METHODS)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return [parameter.tolist() for parameter in open_saved(Path(folder)).model.parameters()]


def test_trained_resumed_and_measured_in_fresh_processes(flatmin, path):
    command = ["train", path, "--method", "squared", "--batch-size", 16, "--out"]
    found = fresh.run(*command, "run", "--set", "strength=0.5", "--epochs", 2)
    assert (found.returncode, found.stderr) == (0, "")
    config = json.loads(Path("run/config.json").read_text())
    assert config["method"] == "squared"
    assert config["settings"] == {"strength": 0.5, "form": "plain", "smoothing": 0.0}
    assert all(epoch["train_loss"] > epoch["train_loss_vanilla"] for epoch in metrics("run"))

    assert fresh.run("sharpness", "run", "--samples", 8, "--eigenvalues", 0).returncode == 0
    assert json.loads(Path("run/sharpness.json").read_text())["method"] == "squared"

    whole = weights_of("run")
    for name in ("last", "previous"):
        Path(f"run/checkpoints/{name}").rename(f"run/checkpoints/{name}-gone")
    Path("run/checkpoints/previous-gone").rename("run/checkpoints/last")
    found = fresh.run("train", "--resume", "run", "--set", "strength=0.5")
    assert (found.returncode, found.stderr) == (0, "")
    assert "epoch 2/2" in found.stdout
    assert weights_of("run") == whole


def test_resumed_from_the_copy_of_the_file_where_it_is_gone(flatmin, path):
    assert fresh.run("train", path, "--method", "squared", "--epochs", 1, "--out", "run").returncode == 0
    Path(path).unlink()
    refused = flatmin("train", "--resume", "run")
    assert refused.code == 2
    assert "run/experiment.py came with the run" in refused.err
    found = fresh.run("train", "--resume", "run", "--trust-experiment")
    assert (found.returncode, found.stderr) == (0, "")
    assert "the run is finished" in found.stdout
    assert fresh.run("sharpness", "run", "--samples", 8, "--eigenvalues", 0, "--trust-experiment").returncode == 0


def test_options_that_differ_from_the_runs_own_are_refused(flatmin, path):
    assert flatmin("train", path, "--method", "squared", "--epochs", 1, "--out", "run").code == 0
    found = flatmin("train", "--resume", "run", "--set", "strength=0.7")
    assert found.code == 2
    assert "--strength 0.7 (the run has 0.1)" in found.err
    found = flatmin("train", "--resume", "run", "--set", "lag=1")
    assert "squared has no hyperparameter 'lag'; it has strength, form, smoothing" in found.err


def test_compared_selected_and_timed_by_worker_processes(flatmin, path):
    options = "--methods base,squared,opposite,twice --set squared.strength=0.1,0.5 --select 1 --seeds 1 --jobs 1"
    options += " --epochs 2 --batch-size 16 --minutes 0.01 --out run"
    command = [sys.executable, "-m", "flatmin", "compare", path, *options.split()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    results = json.loads(Path("run/results.json").read_text())
    names = [row["method"] for row in results["rows"]]
    assert names == ["base", "squared", "opposite", "twice"]
    assert {each["label"] for each in results["selection"]["candidates"]} == {
        "base",
        "squared strength=0.1",
        "squared strength=0.5",
    } - {"base"}
    assert all(row["step_ratio"] > 0 for row in results["rows"])
    for row in results["rows"]:
        run = Path("run/runs") / f"{row['label'].replace(' ', '-')}-seed0"
        last = metrics(run)[-1]
        penalty = last["train_loss"] - last["train_loss_vanilla"]
        assert (penalty > 0, penalty < 0) == (row["method"] == "squared", row["method"] == "opposite")
        assert last["closure_calls"] == (2 if row["method"] == "twice" else 1)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train {} --method squard", "unknown method 'squard', did you mean squared?"),
        ("train {} --method squared --set strength=much", "strength must be a number, got 'much'"),
        ("train {} --method squared --set strenth=1", "no hyperparameter 'strenth', did you mean strength?"),
        ("train {} --method squared --set strength", "must look like coefficient=0.8"),
        ("train {} --method squared --set strength=1 --set strength=2", "--set gives strength twice"),
        ("train {} --method saf --lag 2 --set lag=1", "lag is given twice, by --set and by --lag"),
        ("train {} --method squared --lag 2", "squared has no hyperparameter 'lag'"),
        ("train --method squared", "unknown method 'squared'"),
        ("train {} --method fsam", "unknown method 'fsam'; it is now friendly_sam"),
        ("compare {} --methods base,squard", "unknown method 'squard', did you mean squared?"),
        ("compare {} --methods base,squared --set squared.strength=much", "strength must be a number, got 'much'"),
        ("compare {} --methods base,squared --set squared.lag=1", "squared has no hyperparameter 'lag'"),
        ("compare {} --methods base,looksam", "unknown method 'looksam'; it is now look_sam"),
        ("compare --methods base,squared", "unknown method 'squared'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(flatmin, path, command, said):
    found = flatmin(*command.format(path).split())
    assert found.code == 2
    assert len(found.err.splitlines()) == 1
    assert said in found.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('0.1, "form"', '0.1, "lr"'), "squared has a hyperparameter 'lr', and lr is a part of every run"),
        (('"squared", "small', '"sam", "small'), "there is a method 'sam' already, flatmin's own"),
        (('"opposite"', '"squared"'), "there is a method 'squared' already, registered in"),
        (('"opposite"', '"a.b"'), "name must be letters, digits, _ and -, a letter first, got 'a.b'"),
    ],
)
def test_a_card_that_cannot_be_is_one_line(flatmin, experiment, change, said):
    assert change[0] in METHODS
    found = flatmin("train", experiment(methods=METHODS.replace(*change)), "--method", "squared", "--epochs", 1)
    assert found.code == 2
    assert len(found.err.splitlines()) == 1
    assert said in found.err


def test_own_methods_take_set_too(flatmin, experiment):
    command = ["train", experiment(), "--method", "sam", "--epochs", 1, "--out", "run"]
    assert flatmin(*command, "--set", "rho=0.2", "--set", "when=every:2").code == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert (settings["rho"], settings["when"]) == (0.2, "every:2")
