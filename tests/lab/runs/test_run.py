"""A run on disk: complete, repeatable, and kept as far as it came."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from flatmin.errors import ExperimentError
from flatmin.lab.methods import METHODS
from flatmin.lab.recipe import Run
from flatmin.lab.runs import run as run_module
from flatmin.lab.runs.checkpoint import load_checkpoint
from flatmin.lab.runs.run import train_run
from flatmin.lab.training.trainer import Trainer

KEYS = ["epoch", "train_loss", "train_loss_vanilla", "test_loss", "test_accuracy", "lr", "seconds", "closure_calls"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder / "checkpoints" / "last")["model"]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def scripted(monkeypatch):
    """Lets the evaluation return accuracies that were fixed beforehand."""

    def script(*accuracies):
        coming = iter(accuracies)
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (1.0, next(coming)))

    return script


def test_the_folder_has_what_the_issue_says(folder, make_run, experiment):
    run = make_run("saf", experiment=experiment)
    last = train_run(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "experiment.py",
        "metrics.jsonl",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best", "last", "previous"]
    written = lines(folder)
    assert [list(line) for line in written] == [KEYS] * 3
    assert [line["epoch"] for line in written] == [0, 1, 2]
    assert last == {**written[-1], "extra_bytes": 60 * (4 * 3 + 4), "mean_closure_calls": 1.0}


def test_the_config_has_the_run_the_command_versions_and_hardware(folder, make_run, experiment):
    run = make_run("mesa", seed=4, experiment=experiment, label_noise=0.2)
    train_run(run, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("experiment_digest") == hashlib.sha256(Path(experiment).read_bytes()).hexdigest()
    assert {"command", "method", "settings", "seed", "recipe", "versions", "hardware"} == config.keys()
    assert Run.from_json(config) == run
    assert "torch" in config["versions"]
    assert "processor" in config["hardware"]


@pytest.mark.parametrize("method", list(METHODS))
def test_the_config_is_enough_to_repeat_the_run_bitwise(folder, tmp_path, make_run, experiment, method):
    train_run(make_run(method, seed=3, experiment=experiment, label_noise=0.2, optimizer="adamw", lr=0.01), folder)
    torch.manual_seed(1234)
    again = tmp_path / "again"
    again.mkdir()
    train_run(Run.from_json(json.loads((folder / "config.json").read_text())), again)
    assert same(weights(folder), weights(again))
    assert [{**line, "seconds": 0} for line in lines(folder)] == [{**line, "seconds": 0} for line in lines(again)]


def test_digits_are_repeated_bitwise_too(folder, tmp_path, make_run):
    train_run(make_run("saf", epochs=2, batch_size=128, crop=True), folder)
    again = tmp_path / "again"
    again.mkdir()
    train_run(Run.from_json(json.loads((folder / "config.json").read_text())), again)
    assert same(weights(folder), weights(again))


def test_last_is_the_state_of_the_trainer(folder, make_run, experiment, monkeypatch):
    trainers = []

    class Kept(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append(self)

    monkeypatch.setattr(run_module, "Trainer", Kept)
    train_run(make_run("saf", experiment=experiment), folder)
    state = load_checkpoint(folder / "checkpoints" / "last")
    assert state["epoch"] == trainers[0].epoch == 3
    assert same(state["model"], trainers[0].model.state_dict())
    assert same(state["trajectory"], trainers[0].trajectory.state_dict())
    momentum = trainers[0].optimizer.state_dict()["state"]
    assert all(
        torch.equal(state["optimizer"]["state"][key]["momentum_buffer"], momentum[key]["momentum_buffer"])
        for key in momentum
    )


@pytest.mark.parametrize(
    ("accuracies", "epoch"), [((0.3, 0.9, 0.5, 0.9), 2), ((0.4, 0.3, 0.2, 0.1), 1), ((0.1, 0.2, 0.3, 0.4), 4)]
)
def test_best_is_the_first_epoch_with_the_highest_test_accuracy(
    folder, make_run, experiment, scripted, accuracies, epoch
):
    scripted(*accuracies)
    last = train_run(make_run("base", epochs=4, experiment=experiment), folder)
    assert load_checkpoint(folder / "checkpoints" / "best")["epoch"] == epoch
    assert load_checkpoint(folder / "checkpoints" / "last")["epoch"] == 4
    assert last["test_accuracy"] == accuracies[-1]  # of the last epoch, whichever was best


def test_an_epoch_is_on_disk_before_it_is_told(folder, make_run, experiment):
    seen = []

    def look(metrics):
        epoch = load_checkpoint(folder / "checkpoints" / "last")["epoch"]
        seen.append((metrics["epoch"], epoch, len(lines(folder)), (folder / "config.json").exists()))

    train_run(make_run("base", experiment=experiment), folder, on_epoch=look)
    assert seen == [(0, 1, 1, True), (1, 2, 2, True), (2, 3, 3, True)]


def test_what_was_done_is_kept_when_it_is_ended(folder, make_run, experiment):
    steps = iter(range(6))  # four steps an epoch: in the second epoch there are no more

    def count():
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(make_run("base", experiment=experiment), folder, on_step=count)
    assert [line["epoch"] for line in lines(folder)] == [0]
    assert load_checkpoint(folder / "checkpoints" / "last")["epoch"] == 1


def test_a_loss_that_is_not_a_number_is_written_as_null(folder, make_run, experiment):
    train_run(make_run("base", epochs=1, lr=1e30, experiment=experiment), folder)
    line = json.loads((folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["train_loss"] is None


def test_nothing_is_written_for_a_run_that_cannot_begin(folder, make_run):
    with pytest.raises(ExperimentError):
        train_run(make_run("base", experiment="nowhere.py"), folder)
    assert not any(folder.iterdir())


def test_the_copy_of_an_experiment_file_is_what_was_run(folder, make_run, experiment):
    """Also of one that changes while its data is read."""
    path = Path(experiment)
    content = path.read_text()
    change = f"import pathlib\npathlib.Path({str(path)!r}).write_text('# changed')\n\n"
    path.write_text(content.replace("def train_set(", change + "def train_set("))
    before = path.read_bytes()
    train_run(make_run("base", epochs=1, experiment=experiment), folder)
    assert path.read_bytes() != before
    assert (folder / "experiment.py").read_bytes() == before
