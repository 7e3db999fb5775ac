"""What docs/plug-in/lightning.md says can be run, and so can the example."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("lightning")

import torch
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.integrations._lightning import Net, data, network, without_lightnings_warnings

ROOT = Path(__file__).parents[2]


class Summed(Net):
    """A module as the page describes it.

    Args:
        kind: The loss that it adds.
    """

    def __init__(self, kind):
        super().__init__(network())
        self.kind, self.total = kind, 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        penalty = self.saf(logits) if self.kind == "saf" else self.mesa(logits, x)
        self.total += float(penalty.detach())
        return torch.nn.functional.cross_entropy(logits, y) + penalty


def code():
    section = (ROOT / "docs" / "plug-in" / "lightning.md").read_text()
    return [block.partition("```")[0] for block in section.split("```python\n")[1:]]


def known():
    train_set = TensorDataset(*(tensor[:12] for tensor in data().tensors))
    loader = DataLoader(train_set, batch_size=4)
    modules = {"module": Net(), "module_with_saf": Summed("saf"), "module_with_mesa": Summed("mesa")}
    return {"torch": torch, "flatmin": flatmin, "train_set": train_set, "num_classes": 10, "loader": loader, **modules}


@pytest.mark.parametrize("number", range(2))
def test_the_code_trains(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = known()
    with without_lightnings_warnings():
        exec(code()[number], names)
    if number:
        assert names["module_with_saf"].total > 0
        assert names["module_with_mesa"].total > 0
    else:
        assert names["trainer"].global_step == 4
        assert type(names["trainer"].optimizers[0]) is flatmin.SAM
    assert len(code()) == 2


@pytest.mark.parametrize("method", ["sam", "saf", "mesa"])
def test_the_example_learns(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("lightning_digits", ROOT / "examples" / "lightning_digits.py")
    module = importlib.util.module_from_spec(spec)
    with without_lightnings_warnings():
        spec.loader.exec_module(module)
        assert module.main(method, epochs=6) > 0.85
