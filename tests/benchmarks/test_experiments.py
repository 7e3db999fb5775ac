"""The experiment files of the benchmarks train as flatmin calls them."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from flatmin.lab.methods import get_method, resolve_settings
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.runs.run import train_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def trained(tmp_path):
    """Trains for two epochs with SAF and returns the lines of metrics."""

    def train_it(name, **recipe):
        recipe = Recipe(experiment=str(BENCHMARKS / name), epochs=2, device="cpu", **recipe)
        saf = resolve_settings(get_method("saf"), {"lag": 1, "start_epoch": 0}, epochs=2)
        folder = tmp_path / "run"
        folder.mkdir()
        train_run(Run(recipe, "saf", saf), folder)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train_it


@pytest.fixture
def fashion_mnist(tmp_path, monkeypatch):
    """A folder of small files with the names that the data set's have; each image as bright as its class says."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    labels = torch.arange(10, dtype=torch.uint8).repeat(4)
    images = (25 * labels)[:, None, None].expand(-1, 28, 28)
    for name in ("train", "t10k"):
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, tensor.ndim]) + struct.pack(f">{tensor.ndim}I", *tensor.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + tensor.contiguous().numpy().tobytes())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("fashion_mnist")
def test_fashion(trained):
    first, second = trained("fashion_experiment.py", batch_size=10, train_samples=30)
    assert second["train_loss_vanilla"] < first["train_loss_vanilla"]
    assert second["train_loss"] > second["train_loss_vanilla"]


def test_text(trained, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "text_fidelity", raising=False)
    import text_fidelity

    tokens = torch.randint(9, (64, 17), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    monkeypatch.setattr(text_fidelity, "read_library", lambda settings: text_fidelity.Corpus(tokens, tokens[:20], {}))
    first, second = trained("text_experiment.py", batch_size=16)
    assert second["train_loss_vanilla"] < first["train_loss_vanilla"]
    assert second["train_loss"] > second["train_loss_vanilla"]
    monkeypatch.delitem(sys.modules, "text_fidelity")


def test_bert(trained, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "quantization", raising=False)
    import quantization

    y = torch.arange(3).repeat(32)
    x = torch.cat([torch.full((96, 1), 9), y[:, None] + torch.randint(1, 6, (96, 16))], dim=1)
    data = quantization.Data(x, y, x[:20], y[:20], sections=3, words=10)
    monkeypatch.setattr(quantization, "read", lambda settings: data)
    first, second = trained("bert_experiment.py", batch_size=16)
    assert second["train_loss_vanilla"] < first["train_loss_vanilla"]
    assert second["train_loss"] > second["train_loss_vanilla"]
    monkeypatch.delitem(sys.modules, "quantization")
