"""The notebooks run, learn, and are kept with what they printed."""

import json

import pytest

from docs import notebooks

NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))


def shape(notebook):
    """Of each cell its number, and how many lines it printed."""
    return [
        (cell.get("execution_count"), [len(each["text"]) for each in cell.get("outputs", [])])
        for cell in notebook["cells"]
    ]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """In a folder of its own, on the CPU, without the warnings of others."""
    lightning = pytest.importorskip("tests.integrations._lightning", reason="needs lightning")
    accelerate = pytest.importorskip("tests.integrations._accelerate", reason="needs accelerate")
    transformers = pytest.importorskip("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # as it is at first: else the Trainer prints what its bar would show
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerate.reset()
    with lightning.without_lightnings_warnings():
        yield
    accelerate.reset()
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_learns_and_is_kept_with_what_it_printed(path, alone):
    found = notebooks.run(path)
    assert min(found["names"]["accuracy"].values()) > 0.6
    assert shape(found) == shape(json.loads(path.read_text()))


def test_there_is_one_for_each_trainer():
    assert [path.stem for path in NOTEBOOKS] == ["accelerate", "lightning", "plain", "transformers"]


def test_a_notebook_becomes_a_page_with_its_outputs():
    page = notebooks.page(notebooks.FOLDER / "plain.ipynb")
    assert page.startswith("# flatmin in a plain PyTorch loop\n")
    assert page.count("```python\n") == 3
    assert "```text\nplain  " in page
