"""What docs/plug-in/transformers.md says can be run, and so can the example."""

import importlib.util
import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import flatmin
from tests.integrations._transformers import Rows, arguments, bert, copied, difference, pad

ROOT = Path(__file__).parents[2]


def test_the_code_trains(tmp_path):
    section = (ROOT / "docs" / "plug-in" / "transformers.md").read_text()
    code, own_loss = [block.partition("```")[0] for block in section.split("```python\n")[1:]]
    model = bert()
    before = copied(model)
    args = arguments(tmp_path, num_train_epochs=7)
    names = {"flatmin": flatmin, "model": model, "args": args, "data": Rows(), "collator": pad, "num_labels": 3}
    exec(code, names)
    assert difference(model, before) > 1e-3
    assert type(names["trainer"].optimizer.optimizer) is flatmin.SAM
    assert names["penalty"].history.store is not None
    before = copied(model)
    args.num_train_epochs, args.gradient_accumulation_steps = 1, 2
    exec(own_loss, names)
    assert difference(model, before) > 1e-3


WORDS = (
    "game level player sprite",
    "library header static shared",
    "font glyph serif type",
    "python module import wheel",
)
MORE = ("kernel driver firmware module", "mail server smtp queue")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example():
    return script("transformers_descriptions")


@pytest.mark.parametrize("method", ["base", "sam", "saf", "mesa"])
def test_the_example_learns(example, method, tmp_path, monkeypatch):
    """From a list of packages as apt-cache has it, made here."""
    monkeypatch.chdir(tmp_path)
    choose, text = random.Random(0), ""
    for number in range(180):
        section = number % 6
        words = " ".join(choose.choices((*WORDS, *MORE)[section].split(), k=5))
        text += f"Package: p{number}\nDescription: {words}\nSection: contrib/s{section}\nPriority: optional\n\n"
    assert example.main(method, text, epochs=7) > 0.85


def test_the_example_says_what_it_needs(example, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt-cache, which knows Debian's packages, is not here"):
        example.main("sam")


@pytest.mark.parametrize("method", ["sam", "mesa"])
def test_the_language_model_learns(method, tmp_path, monkeypatch):
    """From 8 bits a byte to about those of the bytes' frequencies; what fills up a piece has no part in it."""
    monkeypatch.chdir(tmp_path)
    lm = script("transformers_causal_lm")
    data = lm.rows(2, each=1000)
    filled = [row for row in data if lm.IGNORED in row["labels"]]
    assert 1 <= len(filled) <= 2
    assert all(set(each) == {lm.PAD} for row in filled for each in [row["input_ids"][row["labels"].index(-100) :]])
    assert lm.main(method, files=5, epochs=2) < 5.5
