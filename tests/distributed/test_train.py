"""A run on several processes: it equals the run on one, only the first rank writes, and an error ends all."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatmin._distributed import rank, size
from flatmin.errors import FlatminWarning
from flatmin.lab.methods import METHODS, resolve_settings
from flatmin.lab.problems.load import load_problem
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.runs.checkpoint import load_checkpoint
from flatmin.lab.runs.run import resume_run, train_run
from flatmin.lab.training.torchrun import joined
from flatmin.lab.training.trainer import Trainer
from tests.distributed._spawn import run_ranks

EXPERIMENT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

X = torch.randn(206, 6, generator=torch.Generator().manual_seed(0))

def model(): return nn.Sequential(nn.Linear(6, 16), {norm}nn.Tanh(), nn.Linear(16, 3))
def train_set(): return TensorDataset(X[:150], X[:150, :3].argmax(1))
def test_set(): return TensorDataset(X[150:], X[150:, :3].argmax(1))
"""
EPOCHS = 6
Metrics = list[dict[str, float]]


class StoppedError(Exception):
    pass


def make_run(experiment: str, method: str, batch_size: int = 15, **given: object) -> Run:
    """Fifteen samples a batch: two ranks have seven and eight of them, and must count them by that."""
    short = {"start_epoch": 2, "lag": 2, "norm": "global", "gamma": 1.0, **given}  # each rank chooses among its own
    settings = {name: value for name, value in short.items() if name in METHODS[method].defaults}
    recipe = Recipe(experiment=experiment, epochs=EPOCHS, batch_size=batch_size, device="cpu", lr=0.2)
    return Run(recipe, method, resolve_settings(METHODS[method], settings, epochs=EPOCHS), seed=1)


def write_experiment(folder: Path, norm: str = "") -> str:
    path = folder / "ranks_experiment.py"
    path.write_text(EXPERIMENT.format(norm=norm))
    return str(path)


def read_metrics(folder: Path) -> Metrics:
    return [{**json.loads(line), "seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_here(run: Run, folder: Path, stop_after: int | None = None) -> None:
    """Trains on this rank; every rank but the first has a folder that is not there, so that it cannot write."""
    steps = []

    def on_step() -> None:
        steps.append(None)
        if len(steps) == stop_after:
            raise StoppedError

    own = folder if rank() == 0 else folder / "not" / "there"
    with contextlib.suppress(StoppedError):
        train_run(run, own, on_step=on_step, checkpoint_minutes=0 if stop_after else 10)


def resume_here(run: Run, folder: Path) -> None:
    resume_run(run, folder)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process(method: str, tmp_path: Path) -> None:
    norm = "nn.LayerNorm(16), " if method == "sam_on" else ""
    run = make_run(write_experiment(tmp_path, norm), method)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_here(run, tmp_path / "one")
    run_ranks(train_here, 2, run, tmp_path / "two")
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == EPOCHS
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last") for name in ("one", "two")]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert states[0]["run"] == states[1]["run"]


@pytest.mark.parametrize("method", ["saf", "mesa"])
def test_ended_anywhere_and_resumed_it_comes_out_to_the_bit(method: str, tmp_path: Path) -> None:
    """With batch norm, whose statistics differ between ranks, and dropout."""
    run = make_run(write_experiment(tmp_path, norm="nn.BatchNorm1d(16), nn.Dropout(0.2), "), method)
    whole = tmp_path / "whole"
    whole.mkdir()
    run_ranks(train_here, 2, run, whole)
    for steps in (23, 40):
        ended = tmp_path / f"ended after {steps}"
        ended.mkdir()
        run_ranks(train_here, 2, run, ended, steps)
        assert load_checkpoint(ended / "checkpoints" / "last")["epoch"] == (steps - 1) // 10
        run_ranks(resume_here, 2, run, ended)
        assert read_metrics(ended) == read_metrics(whole)
        states = [load_checkpoint(folder / "checkpoints" / "last") for folder in (whole, ended)]
        for part in ("model", "trajectory"):
            for name, tensor in states[0][part].items():
                assert torch.equal(states[1][part][name], tensor), name


def test_another_number_of_ranks_keeps_the_history(tmp_path: Path) -> None:
    run = make_run(write_experiment(tmp_path), "saf", history="int8")
    (tmp_path / "run").mkdir()
    (tmp_path / "whole").mkdir()
    train_here(run, tmp_path / "whole")
    run_ranks(train_here, 2, run, tmp_path / "run", 30)
    rows = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")["trajectory"]["history.store.rows"]
    assert rows.shape[1] == 150
    assert rows.any()
    with pytest.warns(FlatminWarning, match="processes was 2 and is 1"):
        resume_run(run, tmp_path / "run")  # on one
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def resume_warned(run: Run, folder: Path) -> None:
    with pytest.warns(FlatminWarning, match="processes was 1 and is 2"):
        resume_run(run, folder)


def test_an_epoch_that_has_no_more_steps_on_this_number_of_ranks_is_closed(tmp_path: Path) -> None:
    """The last three of 150 samples are a fourth step of their own on one rank, and none on two."""
    run = make_run(write_experiment(tmp_path), "base", batch_size=49)
    (tmp_path / "run").mkdir()
    train_here(run, tmp_path / "run", 7)
    progress = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")["progress"]
    assert (progress["steps"], progress["samples"]) == (3, 147)
    run_ranks(resume_warned, 2, run, tmp_path / "run")
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == list(range(EPOCHS))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last")["scheduler"]["last_epoch"] == EPOCHS


def shares(experiment: str) -> list[list[int]]:
    run = make_run(experiment, "base", batch_size=16)
    trainer = Trainer(run, load_problem(run.recipe, 0))
    trainer._randomness.order.manual_seed(5)
    assert size() > 1
    return [list(batch) for batch in trainer._batches]


@pytest.mark.parametrize("world", [2, 4])
def test_each_sample_of_an_epoch_is_seen_by_one_rank(world: int, tmp_path: Path) -> None:
    seen = run_ranks(shares, world, write_experiment(tmp_path))
    for batches in zip(*seen, strict=True):
        assert min(map(len, batches)) >= 2
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
    every = sorted(index for batches in seen for batch in batches for index in batch)
    # On four ranks the last six samples would leave one rank with a single one, which batch norm cannot be trained on.
    assert len(set(every)) == len(every) == (150 if world == 2 else 144)


class Pairs(torch.utils.data.Dataset):
    """No TensorDataset, so that samples are loaded one by one."""

    def __len__(self) -> int:
        return 513

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((6,), float(index)), index % 3


def evaluated(experiment: str) -> tuple[float, float, int]:
    run = make_run(experiment, "base")
    problem = dataclasses.replace(load_problem(run.recipe, 0), test=Pairs())
    trainer = Trainer(run, problem)
    seen: list[int] = []
    trainer.model.register_forward_hook(lambda *given: seen.append(len(given[2])))
    return (*trainer.evaluate(), sum(seen))


def test_evaluation_sees_every_sample_once_though_a_rank_may_have_none_of_the_last_batch(tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path)
    alone = evaluated(experiment)
    assert alone[2] == 513
    for world in (2, 3):
        seen = run_ranks(evaluated, world, experiment)
        assert sum(count for _, _, count in seen) == 513
        for loss, accuracy, _ in seen:
            assert (loss, accuracy) == pytest.approx(alone[:2], rel=1e-5)


def too_many(experiment: str) -> str:
    with pytest.raises(ValueError, match="leave one of them with fewer than two") as error:
        Trainer(make_run(experiment, "base", batch_size=3), load_problem(make_run(experiment, "base").recipe, 0))
    return str(error.value)


def test_too_many_processes_for_the_batch_are_named(tmp_path: Path) -> None:
    for message in run_ranks(too_many, 2, write_experiment(tmp_path)):
        assert "batch_size=3 and 150 samples, shared by 2 processes" in message


def torchrun(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flatmin"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def test_torchrun_trains_and_says_each_thing_once(tmp_path: Path) -> None:
    experiment = Path(write_experiment(tmp_path)).name
    found = torchrun(tmp_path, "train", experiment, "--epochs", "2", "--batch-size", "30", "--out", "run")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "epoch 1/2",
        "epoch 2/2",
        lines[-1],
    ]
    assert found.stderr.count("so it never acts") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "experiment.py",
        "metrics.jsonl",
    ]
    # The first rank alone finds that the folder is taken, and the second must not wait for it.
    again = torchrun(tmp_path, "train", experiment, "--epochs", "2", "--out", "run")
    assert again.returncode != 0
    assert again.stderr.count("flatmin: ") == 1
    assert "flatmin: run: holds something already" in again.stderr


ONE_FAILS = """
import os

def criterion():
    calls = []
    def loss(logits, y):
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            raise {error}
        return nn.functional.cross_entropy(logits, y)
    return loss
"""


def test_an_error_on_one_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    path = Path(write_experiment(tmp_path))
    error = '__import__("flatmin").errors.DataError("on rank 1 only")'
    path.write_text(path.read_text() + ONE_FAILS.format(error=error))
    found = torchrun(tmp_path, "train", path.name, "--method", "base", "--epochs", "2", "--out", "run")
    assert found.returncode != 0
    assert [line for line in found.stderr.splitlines() if line.startswith("flatmin: ")] == ["flatmin: on rank 1 only"]
    assert found.stderr.count("Traceback") == 1  # torchrun's own


def test_ctrl_c_that_another_rank_meets_first_says_what_is_kept(tmp_path: Path) -> None:
    path = Path(write_experiment(tmp_path))
    path.write_text(path.read_text() + ONE_FAILS.format(error="KeyboardInterrupt").replace("== 3", "== 5"))
    found = torchrun(tmp_path, "train", path.name, "--method", "base", "--epochs", "3", "--out", "run")
    said = [line for line in found.stderr.splitlines() if line.startswith("flatmin: ")]
    assert len(said) == 1
    assert said[0].endswith(" of 3 epochs are kept in run; to go on: flatmin train --resume run")


@pytest.mark.parametrize("local", ["0", "1"])
def test_more_processes_than_gpus_are_found_by_all_of_them(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that found nothing would wait for the others."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": local, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given: pytest.fail("it waits for the others"))
    with pytest.raises(ValueError, match="started 2 processes on this machine, which has 1 GPUs"), joined("auto"):
        pass


def test_compare_is_not_for_torchrun(flatmin_environment: None) -> None:
    from flatmin.lab import cli

    assert cli.run(["compare", "--seeds", "1"]) == 2


@pytest.fixture
def flatmin_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
