"""What docs/plug-in/opacus.md says can be run, and so can the example."""

import importlib.util
import logging
from pathlib import Path

import pytest

pytest.importorskip("opacus")

import torch
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.integrations._opacus import flat, quiet

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _few_orders(monkeypatch):
    """Has the accountant try a few orders alone, which is quicker."""
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", [2, 3, 4, 5, 6, 8, 12, 16])
    logging.getLogger("opacus").setLevel(logging.ERROR)


def test_the_code_trains():
    quiet()
    page = (ROOT / "docs" / "plug-in" / "opacus.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) == 1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    before, base = flat(net), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randint(3, (24,))), batch_size=8)
    names = {"torch": torch, "F": F, "flatmin": flatmin, "model": net, "base": base, "loader": loader, "epochs": 2}
    assert "PrivacyEngine()" in blocks[0]
    exec(blocks[0].replace("PrivacyEngine()", 'PrivacyEngine(accountant="rdp")'), names)
    assert not torch.equal(flat(net), before)
    assert 2.8 < names["epsilon"] <= 3.0
    assert names["optimizer"].state_dict()["flatmin"]["state"]


def test_the_example_learns_at_the_same_epsilon():
    spec = importlib.util.spec_from_file_location("opacus_digits", ROOT / "examples" / "opacus_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quiet()
    found = [module.main(rho, epochs=6) for rho in (0.0, 0.01, 1.0)]
    assert found[0][0] > 0.7
    assert found[1][0] > 0.7
    assert found[0][0] != found[2][0]
    assert found[0][1] == found[1][1] == found[2][1] <= 4.0
