"""The code in docs/optimizers.md is run, with stand-ins for what it takes from around it: each makes the same step."""

import copy
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import flatmin
from flatmin.lab.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


BLOCK = re.compile(r"^#+ (.+)$|^```python\n((?:.*\n)*?)```$|((?:^ {4}.*\n)+)", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """The heading and the code of each block, fenced or indented."""
    found, last = [], ""
    for heading, fenced, indented in BLOCK.findall(text):
        last = heading or last
        if not heading:
            found.append((last, textwrap.dedent(fenced or indented)))
    return found


BLOCKS = blocks(PAGE.read_text())


@pytest.fixture
def on_the_cpu(monkeypatch):
    """What is asked of an accelerator is done by the CPU, which has float16 and a scaler too."""
    autocast, scaler = torch.autocast, torch.amp.GradScaler

    class Scaler(scaler):
        def __init__(self) -> None:
            super().__init__("cpu", init_scale=2.0**10)

    monkeypatch.setattr(torch, "autocast", lambda _, dtype: autocast("cpu", dtype))
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)


def surroundings() -> dict[str, object]:
    """What the page takes for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y, criterion = torch.randn(12, 4), torch.randint(3, (12,)), nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = list(zip(x.chunk(3), y.chunk(3), strict=True))
    known = {"torch": torch, "flatmin": flatmin, "model": model, "base": base, "x": x, "y": y, "parts": parts}
    known |= {"criterion": criterion, "optimizer": flatmin.SAM(base, rho=0.05)}

    def closure() -> torch.Tensor:
        known["optimizer"].zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    return known | {"closure": closure}


def test_all_blocks_are_found():
    fenced = PAGE.read_text().count("```python")
    assert [heading for heading, _ in BLOCKS].count("Without a closure") == 2
    assert len(BLOCKS) == fenced + 2


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[heading for heading, _ in BLOCKS])
def test_the_code_makes_the_step_that_a_closure_makes(code, on_the_cpu):
    known, plain = surroundings(), surroundings()
    plain["optimizer"].step(plain["closure"])
    before, passes = copy.deepcopy(known["model"].state_dict()), []
    known["model"].register_forward_pre_hook(lambda *_: passes.append(1))
    exec(compile(code, str(PAGE), "exec"), known)
    if not passes:  # it only says what the closure is, or the optimizer
        known["optimizer"].step(known["closure"])
    assert len(passes) == (2 * len(known["parts"]) if "parts" in code else 2)
    assert known["optimizer"].skipped_steps == 0
    loose = {"rtol": 1e-2, "atol": 1e-3} if "float16" in code else {"rtol": 1e-5, "atol": 1e-6}
    for name, weight in known["model"].state_dict().items():
        torch.testing.assert_close(weight, plain["model"].state_dict()[name], **loose)
        assert (weight - before[name]).abs().max() > 3e-3


def test_the_docs_name_every_method_of_the_command():
    names = re.findall(r"`(\w+)`", PAGE.with_name("methods.md").read_text())
    assert not set(METHODS) - set(names)
