"""The benchmarks of the history run from end to end, on small data, and notice what they are there to notice."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flatmin.history._store import Store

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def history(monkeypatch):
    return load("history", monkeypatch)


def shape(history, whole, **options):
    return history.Shape("small", 3001, 120, whole=whole, batch=64, pool=256, batches=4, **options)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", ["lowrank", "topk", "int6", "half"])
def test_history(history, form, whole, tmp_path):
    case = history.measure(shape(history, whole, goals=((form, 10**7),)), form, str(tmp_path))
    assert history.check(case) == ""
    assert case["meets_goal"]
    assert case["write"]["batches"] == 4 * (47 if whole else 4)
    assert case["read"]["batches"] == 3 * (47 if whole else 4)
    assert ("store" in case) != whole
    assert case["name"] in history.table([case])


def test_history_says_what_is_wrong(history, monkeypatch):
    small, read = shape(history, True, goals=(("int6", 10),)), Store.read
    assert history.check(history.measure(small, "int6")) == "small int6: takes 864288 bytes, and 10 are the goal"
    monkeypatch.setattr(Store, "read", lambda *arguments: (read(*arguments)[0].roll(1, 0), read(*arguments)[1]))
    assert "rows are not what was written" in history.check(history.measure(small, "int6"))
    monkeypatch.setattr(Store, "read", lambda *arguments: (read(*arguments)[0], read(*arguments)[1] - 1))
    assert "rows are of another epoch" in history.check(history.measure(small, "int6"))
    with pytest.raises(SystemExit, match="what was written in epoch 0 is not what is read"):
        history.measure(shape(history, False), "int6")


def test_every_sample_is_visited_once(history):
    for samples in (3001, *(each.num_samples for each in history.SHAPES[:1])):
        visited = torch.cat(list(history.batches(samples, 1024)))
        assert torch.equal(visited.sort().values, torch.arange(samples))
    assert all(each.num_samples % history.STRIDE for each in history.SHAPES)


def test_ranks_count_what_is_sent(tmp_path):
    command = f"{FOLDER}/ranks.py --ranks 2 --forms int6 --batches 2 --epochs 1 --out {tmp_path}/ranks.json"
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True, timeout=120)
    replicate, shard = json.loads((tmp_path / "ranks.json").read_text())["cases"]
    assert replicate["row_bytes_per_rank"] == 128 * (752 + 4)
    assert replicate["index_bytes_per_rank"] == shard["index_bytes_per_rank"] == 8 * (128 + 2)
    # Written and read, of each about a half is with the other rank.
    assert 0.8 < shard["row_bytes_per_rank"] / replicate["row_bytes_per_rank"] < 1.2
    assert shard["row_bytes_per_rank"] % ((752 + 4) / 4) == 0
    assert shard["history_bytes_per_rank"] == replicate["history_bytes_per_rank"] / 2
