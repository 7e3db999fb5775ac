"""``flatmin train --resume``: after a kill, on a full disk, with other options."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flatmin.lab.runs.checkpoint import load_checkpoint
from tests import fresh

TRAIN = [sys.executable, "-m", "flatmin", "train"]
SLOW = "import time\ndef criterion(): return lambda *a: (time.sleep(0.1), nn.functional.cross_entropy(*a))[1]"


def lines(folder):
    return [{**json.loads(line), "seconds": 0} for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def tensors(folder, which="last"):
    """All tensors of a checkpoint, by the place where they stand."""

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, f"{name}.{key}")

    state = load_checkpoint(Path(folder) / "checkpoints" / which)
    return dict(walk({part: state[part] for part in ("model", "optimizer", "trajectory", "ranks")}, ""))


def assert_same(one, other):
    assert lines(one) == lines(other)
    for which in ("last", "best"):
        ours, theirs = tensors(one, which), tensors(other, which)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("method", ["saf", "mesa"])
def test_killed_at_random_moments_the_result_is_bit_identical(flatmin, tmp_path, method):
    options = ["--method", method, "--epochs", "4", "--start-epoch", "2", "--seed", "3", "--crop", "--device", "cpu"]
    options += ["--lag", "2"] if method == "saf" else []
    assert flatmin("train", *options, "--out", "whole").code == 0
    draw, killed = random.Random(method), 0
    command = [*options, "--out", "run"]
    while killed < 3:
        before = newest(tmp_path)
        process = fresh.start("train", *command, "--checkpoint-minutes", "0", cwd=tmp_path)
        while newest(tmp_path) == before and process.exitcode is None:  # it has begun to write
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.join()
        assert Path(".stderr").read_text() == ""
        killed += 1
        command = ["--resume", "run"]
    assert flatmin("train", "--resume", "run").code == 0
    assert_same("run", "whole")


def newest(folder):
    path = folder / "run/checkpoints/last/state.json"
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@pytest.fixture
def ended(flatmin, experiment, monkeypatch):
    """A run in the folder ``run`` of three epochs, ended in the second, and its experiment file."""
    from flatmin.lab.training.trainer import Trainer

    path, evaluate, count = experiment(), Trainer.evaluate, []

    def evaluating(self):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", evaluating)
    found = flatmin("train", path, "--method", "mesa", "--epochs", 3, "--lr", 0.05, "--batch-size", 16, "--out", "run")
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert found.code == 2
    assert "1 of 3 epochs are kept in run; to go on: flatmin train --resume run" in found.err
    return path


class TestOptions:
    def test_it_goes_on_with_its_own(self, flatmin, ended):
        options = ["--method", "mesa", "--epochs", 3, "--lr", 0.05, "--batch-size", 16]
        assert flatmin("train", ended, *options, "--out", "whole").code == 0
        found = flatmin("train", "--resume", "run")
        assert (found.code, found.err) == (0, "")
        assert [line.split("  ")[0] for line in found.out.splitlines()[:-1]] == ["epoch 2/3", "epoch 3/3"]
        assert_same("run", "whole")

    def test_those_that_are_the_same_may_be_given(self, flatmin, ended):
        options = ["--method", "mesa", "--epochs", 3, "--out", "run/", "--start-epoch", 5, "--checkpoint-minutes", 1]
        assert flatmin("train", ended, "--resume", "run", *options).code == 0

    def test_the_device_and_the_workers_may_be_others(self, flatmin, ended):
        assert flatmin("train", "--resume", "run", "--device", "cpu", "--workers", 1).code == 0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("--lr 0.1", "--lr 0.1 (the run has 0.05)"),
            ("--epochs 4 --method saf", "--epochs 4 (the run has 3), --method saf (the run has mesa); leave them out"),
            ("--coefficient 1", "--coefficient 1.0 (the run has 0.8)"),
            ("--rho 1", "--rho 1.0 (the run was begun without)"),
            ("--weight-decay 1", "--weight-decay 1.0 (the run was begun without)"),
            ("--seed 1", "--seed 1 (the run has 0)"),
            ("--crop", "--crop True (the run has False)"),
            ("--out other", "--out other (the run has run)"),
            ("other.py", "the experiment file other.py"),
            ("--checkpoint-minutes -1", "--checkpoint-minutes"),
        ],
    )
    def test_others_are_refused_by_name(self, flatmin, ended, options, said):
        found = flatmin("train", "--resume", "run", *options.split())
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert said in found.err
        assert len(lines("run")) == 1

    def test_a_finished_run_says_so(self, flatmin, ended):
        assert flatmin("train", "--resume", "run").code == 0
        found = flatmin("train", "--resume", "run")
        assert (found.code, found.err) == (0, "")
        assert found.out.splitlines()[0] == "the run is finished: all 3 epochs were done before"

    def test_a_damaged_checkpoint_is_one_line(self, flatmin, ended):
        assert flatmin("train", "--resume", "run", "--checkpoint-minutes", 0).code == 0
        Path("run/checkpoints/last/tensors.safetensors").write_bytes(b"")
        found = flatmin("train", "--resume", "run")
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert "run/checkpoints/last: the checkpoint is damaged: tensors.safetensors: it has 0 bytes" in found.err
        assert "run/checkpoints/previous holds epoch 2: flatmin train --resume run/checkpoints/previous" in found.err
        assert flatmin("train", "--resume", "run/checkpoints/previous").code == 0
        assert len(lines("run")) == 3

    @pytest.mark.parametrize("path", ["nowhere", "."])
    def test_no_run(self, flatmin, path):
        found = flatmin("train", "--resume", path)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert "no run there to continue" in found.err


def test_ended_before_the_first_epoch_a_checkpoint_is_kept(flatmin, experiment, monkeypatch):
    from flatmin.lab.training.trainer import Trainer

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "evaluate", interrupt)
    found = flatmin("train", experiment(), "--batch-size", 16, "--checkpoint-minutes", 0, "--out", "run")
    assert "0 of 60 epochs are kept in run; to go on: flatmin train --resume run" in found.err
    assert load_checkpoint(Path("run/checkpoints/last"))["progress"]["steps"] == 3


def test_two_at_once(flatmin, tmp_path, experiment):
    command = [*TRAIN, experiment(criterion=SLOW), "--method=base", "--epochs=1000", "--out=run"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("epoch ")
            found = flatmin("train", "--resume", "run")
        finally:
            process.send_signal(signal.SIGKILL)
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert "run: another process is writing this run at the moment" in found.err


LIMITED = """
import resource, sys
from flatmin.lab import cli
from flatmin.lab.runs import writer

def limited(*arguments, **options):
    if len(arguments[1]["metrics"]) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return save(*arguments, **options)

save, writer.save_checkpoint = writer.save_checkpoint, limited
sys.exit(cli.run(sys.argv[1:]))
"""


def check_full(process):
    """One message, and everything as it was after the last epoch that fitted."""
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("flatmin: ")
    assert "checkpoints/last: the checkpoint could not be written: " in process.stderr
    assert "the one before it is intact; when there is room: flatmin train --resume " in process.stderr


def test_a_file_that_may_grow_no_further(flatmin, tmp_path, experiment):
    options = [experiment(), "--method", "mesa", "--epochs", "6", "--batch-size", "16"]
    command = [sys.executable, "-c", LIMITED, "train", *options, "--out", "run"]
    check_full(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120))
    assert load_checkpoint(Path("run/checkpoints/last"))["epoch"] == len(lines("run")) == 1
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["best", "last"]
    assert flatmin("train", "--resume", "run").code == 0
    assert flatmin("train", *options, "--out", "whole").code == 0
    assert_same("run", "whole")


def test_a_full_disk(flatmin, tmp_path, experiment):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        options = [experiment(), "--method", "base", "--epochs", "9", "--batch-size", "16"]
        run = str(small / "run")
        command = ["train", *options, "--out", run]
        check_full(fresh.run(*command, cwd=tmp_path))
        assert load_checkpoint(Path(run, "checkpoints/last"))["epoch"] == len(lines(run)) >= 1
        subprocess.run(["mount", "-o", "remount,size=1m", run.removesuffix("/run")], check=True)
        assert flatmin("train", "--resume", run).code == 0
        assert len(lines(run)) == 9
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
