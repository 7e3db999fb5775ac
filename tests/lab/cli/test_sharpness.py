"""The commands that measure saved runs."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from flatmin.lab.runs import after as after_module
from flatmin.lab.runs import measure_landscape, measure_sharpness
from flatmin.lab.runs.checkpoint import load_checkpoint


@pytest.fixture
def run(flatmin, experiment):
    """Trains a run of a method and returns its folder."""

    def train(method="base", *options):
        found = flatmin("train", experiment(), "--method", method, "--epochs", 2, "--out", method, *options)
        assert found.code == 0, found.err
        return method

    return train


def test_sharpness_of_a_run(flatmin, run):
    folder = run("mesa")
    found = flatmin("sharpness", folder, "--eigenvalues", 2, "--trace", "--density", "--samples", 20)
    assert found.code == 0, found.err
    assert "compare the values of normalised logits" in found.out
    written = json.loads(Path(f"{folder}/sharpness.json").read_text())
    names = [(entry["name"], entry["logits"]) for entry in written["measures"]]
    assert ("sam_sharpness", "raw") in names
    assert ("hessian_trace", "normalised") in names
    assert written["data"] == {"set": "train", "samples": 20, "seed": 0}
    assert written["checkpoint_epoch"] == 2
    assert len(written["eigenvalues"]) == 2
    assert len(written["spectral_density"]["grid"]) == len(written["spectral_density"]["density"])
    again = flatmin("sharpness", f"{folder}/checkpoints/best", "--float64", "--train-mode", "--eigenvalues", 0)
    assert again.code == 0, again.err


def test_of_two_classes_nothing_is_said_with_normalised_logits(flatmin, tmp_path):
    (tmp_path / "two.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def train_set():\n"
        "    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))\n"
        "    return TensorDataset(x, (x[:, 0] > 0).long())\n"
        "test_set = train_set\n"
        "def model(): return torch.nn.Linear(4, 2)\n"
    )
    trained = flatmin(
        "train", tmp_path / "two.py", "--method", "base", "--epochs", 1, "--log-sharpness", 1, "--out", "two"
    )
    assert trained.code == 0, trained.err
    metrics = json.loads(Path("two/metrics.jsonl").read_text())
    assert metrics["sharpness"] > 0
    assert "sharpness_normalised" not in metrics
    found = flatmin("sharpness", "two", "--trace")
    assert found.code == 0, found.err
    assert "fewer than three classes" in found.out
    written = json.loads(Path("two/sharpness.json").read_text())["measures"]
    assert len(written) == 6
    assert {each["logits"] for each in written} == {"raw"}
    lines = [line.split() for line in found.out.splitlines() if line.startswith("│")]
    assert len(lines) == 6
    assert all(line[-2] == "-" for line in lines)


def test_landscapes_of_runs_and_the_plane_through_three(flatmin, run):
    runs = [run("base"), run("smoothing"), run("ema")]
    assert flatmin("landscape", *runs, "--points", 3).code == 0
    written = [json.loads(Path(f"{folder}/landscape.json").read_text()) for folder in runs]
    assert [len(row) for row in written[2]["loss"]] == [3, 3, 3]
    assert written[0]["x"] == written[1]["x"]
    assert flatmin("landscape", "--plane", *runs, "--points", 3).code == 0
    plane = json.loads(Path("base/landscape.json").read_text())
    assert plane["kind"] == "plane"
    assert [place["name"] for place in plane["checkpoints"]] == runs
    assert flatmin("landscape", "base", "--directions", 1, "--points", 4).code == 0
    assert json.loads(Path("base/landscape.json").read_text())["y"] is None


def test_after_measures_each_run_and_writes_it_beside(flatmin, run):
    found = flatmin("after", run("base"), run("ema"), "--device", "cpu")
    assert found.code == 0, found.err
    written = [json.loads(Path(f"{folder}/after.json").read_text())["test_accuracy"] for folder in ("base", "ema")]
    lines = [line.strip("│ ").split("│") for line in found.out.splitlines() if line.startswith("│")]
    assert [line[0].strip() for line in lines] == ["base, base", "ema, ema"]
    assert [[each.strip() for each in line[1:]] for line in lines] == [
        [f"{100 * share:.2f}" for share in shares.values()] for shares in written
    ]
    assert found.out.endswith("written to base/after.json\nwritten to ema/after.json\n")
    assert "ema: fine-tune" in found.err.splitlines()


def test_ctrl_c_while_runs_are_measured_after_training_says_which_are_written(flatmin, run, monkeypatch):
    runs, plain = [run("base"), run("ema")], after_module.write_after

    def interrupted(saved, **options):
        if saved.name == "ema":
            raise KeyboardInterrupt
        return plain(saved, **options)

    monkeypatch.setattr(after_module, "write_after", interrupted)
    found = flatmin("after", *runs)
    said = "flatmin: interrupted: base/after.json is written; nothing was written"
    assert (found.code, found.err.splitlines()[-1]) == (2, said)
    assert not Path("ema/after.json").exists()


def test_the_command_writes_what_python_writes(flatmin, run):
    folder = Path(run("base"))

    def written(name):
        path = folder / name
        found = json.loads(path.read_text())
        path.unlink()
        return {key: value for key, value in found.items() if key != "command"}

    measure_sharpness(folder, rho=0.1, samples=20, seed=1, eigenvalues=0, trace=True, float64=True, train_mode=True)
    python = written("sharpness.json")
    words = ("--rho", 0.1, "--samples", 20, "--seed", 1, "--eigenvalues", 0, "--trace", "--float64", "--train-mode")
    assert flatmin("sharpness", folder, *words).code == 0
    assert written("sharpness.json") == python
    measure_landscape(folder, points=3, radius=0.5, directions=1, direction_seed=2, samples=30, seed=1)
    python = written("landscape.json")
    words = ("--points", 3, "--radius", 0.5, "--directions", 1, "--direction-seed", 2, "--samples", 30, "--seed", 1)
    assert flatmin("landscape", folder, *words).code == 0
    assert written("landscape.json") == python


def test_the_average_is_what_is_measured(flatmin, run):
    from flatmin.lab.runs.saved import open_saved

    folder = run("ema")
    model, state = open_saved(folder).model, load_checkpoint(open_saved(folder).folder / "checkpoints/last")
    assert not torch.equal(model[0].weight, state["model"]["0.weight"])
    assert any(torch.equal(model[0].weight, v) for v in state["average"].values() if isinstance(v, torch.Tensor))


def test_what_cannot_be_measured_is_said_in_a_line(flatmin, run, experiment, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("sharpness", "landscape", "after"):
        found = flatmin(command, "empty")
        assert found.code == 2
        assert "no run there" in found.err
    folder = run("base")
    assert "rho must be" in flatmin("sharpness", folder, "--rho", 0).err
    assert "radius must be" in flatmin("landscape", folder, "--radius", -1).err
    assert "three runs" in flatmin("landscape", "--plane", folder).err
    (tmp_path / "base" / "config.json").write_text(
        (tmp_path / "base" / "config.json").read_text().replace('"tiny_experiment.py"', '"other.py"')
    )
    other = (tmp_path / "tiny_experiment.py").read_text().replace("nn.Linear(4, 8)", "nn.Linear(4, 9)")
    (tmp_path / "base" / "experiment.py").write_text(
        other.replace("BatchNorm1d(8)", "BatchNorm1d(9)").replace("(8, 3)", "(9, 3)")
    )
    (tmp_path / "other.py").write_text((tmp_path / "base" / "experiment.py").read_text())
    assert "other.py has changed since the run began" in flatmin("sharpness", folder).err
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["experiment_digest"] = sha256((tmp_path / "other.py").read_bytes()).hexdigest()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = flatmin("sharpness", folder)
    assert found.code == 2
    assert "not a checkpoint of this run's network: model.0.weight" in found.err


def test_only_what_is_asked_for_is_read_of_a_checkpoint(flatmin, run):
    folder = Path(run("saf")) / "checkpoints/last"
    whole, part = load_checkpoint(folder), load_checkpoint(folder, only=("model", "epoch"))
    assert set(part) == {"model", "epoch"}
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in part["model"].items())
