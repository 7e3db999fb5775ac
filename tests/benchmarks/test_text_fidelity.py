"""The benchmark on text runs from end to end, goes on where it stopped, and compares what it says it compares."""

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "text_fidelity.py"
MODULES = ("bisect", "calendar", "cmd", "code", "copy", "csv", "dis", "fnmatch", "glob", "gzip", "heapq", "queue")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("text_fidelity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.ROWS, "cooler", {"temperature": 1.0})
    return module


@pytest.fixture
def command(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"], f"{name}.py"), corpus)
    return (
        f"--out {tmp_path}/result.json --corpus {corpus} --rows base,dense,cooler --seeds 2 --epochs 4 --lag 1 "
        "--start-epoch 2 --windows 400 --test-windows 100 --vocabulary 300 --width 16 --batch 64 --every 2 --seconds 0"
    ).split()


def test_it_measures_and_goes_on_where_it_stopped(script, command, tmp_path, monkeypatch, capsys):
    script.main(["--parts", "fidelity,runs", *command])
    result = json.loads((tmp_path / "result.json").read_text())
    runs = {(run["row"], run["seed"]): run["curve"] for run in result["runs"]}
    assert set(runs) == {(row, seed) for row in ("base", "dense", "cooler") for seed in (0, 1)}
    assert [epoch["trajectory_loss"] > 0 for epoch in runs["dense", 0]] == [False, False, True, True]
    assert runs["dense", 0][:2] == runs["base", 0][:2] != runs["base", 1][:2]  # paired: same weights, same order
    assert runs["dense", 0][3] != runs["base", 0][3]
    dense, cooler = result["fidelity"]["rows"]
    assert dense["mean"] == {"cosine": pytest.approx(1), "relative_error": 0, "whole_error": 0, "loss_error": 0}
    assert cooler["mean"]["cosine"] < 0.9999
    assert [epoch["epoch"] for epoch in cooler["epochs"]] == [2, 3]

    monkeypatch.setattr(script, "train", None)  # what is done is not done again
    script.main([*command, "--plot", f"{tmp_path}/plot.svg"])
    after = json.loads((tmp_path / "result.json").read_text())
    assert after["runs"] == result["runs"]
    assert [entry["row"] for entry in after["timing"]] == ["base", "dense", "cooler"]
    assert "cooler" in (tmp_path / "plot.svg").read_text()
    assert "| dense | 1,204 | 100.0% | 1.00000 | 0 | 0 | 0 |" in capsys.readouterr().out


def test_a_result_of_other_settings_is_left_alone(script, command, tmp_path):
    script.main(["--parts", "timing", *command])
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*command, "--lr", "0.1"])
    script.ROWS["cooler"]["temperature"] = 2.0
    with pytest.raises(SystemExit, match="other arguments of cooler"):
        script.main(command)
    assert (tmp_path / "result.json").read_text() == before


def test_windows_overlap_only_where_there_would_be_too_few(script):
    documents = [script.torch.arange(10), script.torch.arange(100, 109)]
    assert script._draw_windows(documents, 5, 3)[1] == 5
    windows, stride = script._draw_windows(documents, 5, 4)
    assert stride == 4
    assert all((window.diff() == 1).all() for window in windows)
    with pytest.raises(SystemExit, match="too small"):
        script._draw_windows(documents, 5, 12)
