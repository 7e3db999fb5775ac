"""``flatmin train`` from the command line to the files it leaves."""

import gzip
import importlib.metadata
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import flatmin as library
from flatmin.lab.runs.checkpoint import load_checkpoint

FLAGS = """--method --epochs --seed --batch-size --lr --momentum --weight-decay --optimizer --rho --coefficient
--temperature --lag --start-epoch --ema-epochs --smoothing --out
--data --model --label-noise --crop --flip --precision --resume --checkpoint-minutes"""


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


class TestHelp:
    @pytest.mark.parametrize("flag", FLAGS.split())
    def test_every_flag_of_the_issue_is_explained(self, flatmin, flag):
        found = flatmin("train", "--help")
        assert found.code == 0
        assert re.search(rf"^ +{flag}\b.*\w", found.out, flags=re.MULTILINE)

    def test_the_defaults_are_said(self, flatmin):
        text = " ".join(flatmin("train", "--help").out.split())
        for default in ("[default: saf]", "[default: 60]", "[default: 128]", "[default: digits]", "0.1 for sgd"):
            assert default in text

    def test_the_commands_are_listed(self, flatmin):
        found = flatmin("--help")
        assert (found.code, found.err) == (0, "")
        assert "train" in found.out
        assert "compare" in found.out

    def test_without_a_command_the_help_can_be_read(self, flatmin):
        found = flatmin()
        assert "\n  train " in found.out + found.err

    def test_the_version(self, flatmin):
        assert flatmin("--version").out == f"flatmin {library.__version__}\n"


class TestRun:
    def test_it_prints_an_epoch_a_line_and_the_last_accuracy(self, flatmin, experiment):
        found = flatmin("train", experiment(), "--method", "base", "--epochs", 3, "--out", "run")
        lines = found.out.splitlines()
        last = metrics("run")[-1]["test_accuracy"]
        assert (found.code, found.err, len(lines)) == (0, "", 4)
        assert [line.split("  ")[0] for line in lines[:3]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
        assert lines[3] == f"test accuracy after the last epoch {100 * last:.2f} %; the run is in run"

    def test_every_flag_reaches_the_run(self, flatmin):
        recipe = "--data digits --model cnn --epochs 1 --batch-size 256 --optimizer adamw --lr .01 --momentum .8"
        recipe += " --weight-decay .1 --crop --flip --label-noise .2 --precision bfloat16 --device cpu"
        saf = "--method saf --coefficient .5 --temperature 2 --lag 1 --start-epoch 0 --smoothing .05 --seed 7"
        saf += " --history int8 --mean-momentum .5"
        assert flatmin("train", *recipe.split(), *saf.split(), "--out", "run").code == 0
        found = config("run")
        assert (found["method"], found["seed"]) == ("saf", 7)
        assert found["settings"] == {
            "coefficient": 0.5,
            "temperature": 2.0,
            "lag": 1,
            "start_epoch": 0,
            "history": "int8",
            "mean_momentum": 0.5,
            "smoothing": 0.05,
        }
        expected = {"optimizer": "adamw", "lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "label_noise": 0.2}
        expected |= {"data": "digits", "model": "cnn", "epochs": 1, "batch_size": 256, "precision": "bfloat16"}
        assert found["recipe"].items() >= {**expected, "crop": True, "flip": True, "device": "cpu"}.items()

    @pytest.mark.parametrize(
        ("method", "flag", "value"),
        [("sam", "rho", 0.2), ("mesa", "ema_epochs", 3.0), ("mesa", "fraction", 0.25), ("mesa", "interval", 2)],
    )
    def test_flags_of_the_other_methods(self, flatmin, experiment, method, flag, value):
        options = ["--method", method, f"--{flag.replace('_', '-')}", value, "--epochs", 6, "--out", "run"]
        assert flatmin("train", experiment(), *options).code == 0
        assert config("run")["settings"][flag] == value

    def test_the_penalty_is_printed_and_written_apart(self, flatmin, experiment):
        options = ["--lag", 1, "--start-epoch", 1, "--epochs", 2, "--batch-size", 16]
        found = flatmin("train", experiment(), *options, "--out", "run")
        assert found.err == ""
        last = metrics("run")[-1]
        assert last["train_loss"] > last["train_loss_vanilla"]
        assert f"loss {last['train_loss']:.4f} (without penalty {last['train_loss_vanilla']:.4f})" in found.out

    @pytest.mark.parametrize("method", ["saf", "mesa"])
    def test_a_penalty_that_never_acts_is_warned_of(self, flatmin, experiment, method):
        found = flatmin("train", experiment(), "--method", method, "--epochs", 5, "--batch-size", 16)
        assert found.code == 0
        assert f"flatmin: warning: {method}: the trajectory loss would begin in epoch 5" in found.err
        assert flatmin("train", experiment(), "--method", method, "--epochs", 6, "--batch-size", 16).err == ""

    def test_bfloat16(self, flatmin):
        assert flatmin("train", "--epochs", 1, "--precision", "bfloat16", "--method", "sam", "--out", "run").code == 0
        assert 0 < metrics("run")[0]["train_loss"] < 5
        weights = load_checkpoint(Path("run/checkpoints/last"))["model"].values()
        assert {value.dtype for value in weights} == {torch.float32, torch.int64}

    @pytest.mark.parametrize("extra", ["", "def criterion(): return nn.MultiMarginLoss()"])
    @pytest.mark.parametrize("optimizer", ["", "def optimizer(p): return torch.optim.SGD(p, lr=0.25)"])
    def test_an_experiment_with_and_without_criterion_and_optimizer(self, flatmin, experiment, extra, optimizer):
        path = experiment(criterion=extra, optimizer=optimizer)
        assert flatmin("train", path, "--method", "base", "--epochs", 1, "--out", "run").code == 0
        assert metrics("run")[0]["lr"] == (0.25 if optimizer else 0.1)
        assert (metrics("run")[0]["train_loss"] < 0.9) is bool(extra)  # a cross entropy begins at log 3
        assert Path("run/experiment.py").read_text() == Path(path).read_text()


class TestFolder:
    def test_without_out_each_run_gets_a_new_one_even_in_the_same_second(self, flatmin, experiment):
        path = experiment()
        for _ in range(3):
            assert flatmin("train", path, "--method", "base", "--epochs", 1).code == 0
        folders = list(Path("runs").iterdir())
        assert len(folders) == 3
        assert all(len(metrics(folder)) == 1 and "base-seed0" in folder.name for folder in folders)

    def test_an_empty_folder_is_taken(self, flatmin, experiment):
        Path("run").mkdir()
        assert flatmin("train", experiment(), "--method", "base", "--epochs", 1, "--out", "run").code == 0
        assert len(metrics("run")) == 1

    def test_never_over_another_run(self, flatmin, experiment):
        command = ["train", experiment(), "--method", "base", "--epochs", 1, "--out", "run"]
        assert flatmin(*command).code == 0
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        found = flatmin(*command, "--seed", 1)
        assert found.code == 2
        assert "run: holds something already" in found.err
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


class TestData:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_idx_files(self, flatmin, tmp_path, zipped):
        generator = torch.Generator().manual_seed(0)
        for part, count in (("train", 40), ("t10k", 20)):
            images = torch.randint(256, (count, 8, 8), generator=generator, dtype=torch.uint8).numpy().tobytes()
            labels = bytes(number % 3 for number in range(count))
            for name, shape, content in (("images", (count, 8, 8), images), ("labels", (count,), labels)):
                content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content
                path = tmp_path / f"{part}-{name}-idx{len(shape)}-ubyte{'.gz' if zipped else ''}"
                path.write_bytes(gzip.compress(content) if zipped else content)
        found = flatmin("train", "--data", f"idx:{tmp_path}", "--method", "base", "--epochs", 2, "--out", "run")
        assert (found.code, found.err, len(metrics("run"))) == (0, "", 2)
        assert load_checkpoint(Path("run/checkpoints/last"))["model"]["0.weight"].shape[1] == 1

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_folder_of_images(self, flatmin, tmp_path, workers):
        for number in range(24):
            path = tmp_path / "images" / ("dark" if number % 2 else "light") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 9), (20, 30, 40 + number) if number % 2 else (200, 210, 180 + number)).save(path)
        options = ["--image-size", 8, "--epochs", 4, "--batch-size", 4, "--lag", 1, "--start-epoch", 1]
        options += ["--workers", workers, "--label-noise", 0.1, "--flip"]
        found = flatmin("train", "--data", f"folder:{tmp_path / 'images'}", *options, "--out", "run")
        assert (found.code, found.err) == (0, "")
        assert metrics("run")[-1]["test_accuracy"] == 1
        assert load_checkpoint(Path("run/checkpoints/last"))["model"]["0.weight"].shape[1] == 3

    def test_signals(self, flatmin):
        pytest.importorskip("mnist1d")
        options = "--data mnist1d --model cnn1d --label-noise 0.2 --method saf --epochs 3 --lag 1 --start-epoch 1"
        found = flatmin("train", *options.split(), "--out", "run")
        assert found.code == 0, found.err
        assert metrics("run")[-1]["test_accuracy"] > 0.3
        assert config("run")["versions"]["mnist1d"] == importlib.metadata.version("mnist1d")


class TestProcess:
    def test_python_m_and_the_version(self):
        found = python("-m", "flatmin", "--version")
        assert (found.returncode, found.stdout, found.stderr) == (0, f"flatmin {library.__version__}\n", "")

    def test_the_library_loads_no_third_party_but_torch_and_what_torch_loads(self):
        code = "import sys, torch; known = set(sys.modules); import flatmin; print(*(set(sys.modules) - known))"
        found = python("-c", code)
        packages = {name.split(".")[0] for name in found.stdout.split()}
        assert "flatmin" in packages
        assert packages - set(sys.stdlib_module_names) <= {"flatmin", "torch"}

    @pytest.mark.parametrize("missing", ["typer", "rich"])
    def test_without_the_extra_the_command_says_what_to_install(self, missing):
        block = f"import sys, runpy; sys.modules['{missing}'] = None; sys.argv = ['flatmin', 'compare']; "
        found = python("-c", block + "runpy.run_module('flatmin', run_name='__main__')")
        assert found.returncode != 0
        assert len(found.stderr.splitlines()) == 1
        assert f"needs {missing}" in found.stderr
        assert "pip install 'flatmin[cli]'" in found.stderr

    @pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda kind: kind.name)
    def test_ctrl_c_or_a_kill_keeps_what_was_done_and_says_so(self, flatmin, experiment, kind):
        slow = "import time\ndef criterion(): return lambda *a: (time.sleep(0.1), nn.functional.cross_entropy(*a))[1]"
        path = experiment(criterion=slow)
        command = [sys.executable, "-m", "flatmin", "train", path, "--method=base", "--epochs=100000"]
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, "--out=run"], stdout=pipe, stderr=pipe, text=True) as process:
            try:
                assert process.stdout.readline().startswith("epoch ")
                os.kill(process.pid, kind)
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
        done = len(metrics("run"))
        go_on = "to go on: flatmin train --resume run"
        said = re.fullmatch(rf"flatmin: interrupted: (\d+) of 100000 epochs are kept in run; {go_on}\n", err)
        assert process.returncode == 2
        assert said is not None, err
        assert int(said[1]) == done
        assert load_checkpoint(Path("run/checkpoints/last"))["epoch"] in (done, done + 1)
        assert config("run")["recipe"]["epochs"] == 100000


def test_a_history_that_is_chosen_says_which_and_why(flatmin, experiment):
    found = flatmin("train", experiment(), "--history", "auto", "--epochs", 1, "--batch-size", 16, "--out", "run")
    assert found.code == 0
    assert [line for line in found.err.splitlines() if "history 'dense': " in line and "of main memory" in line] != []
    assert config("run")["settings"]["history"] == "auto"
