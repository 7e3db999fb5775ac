"""The tables of methods in the docs are those that docs/tables.py writes, and it notices when one is not."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flatmin.lab.methods import FORMER_NAMES, METHODS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "tables.py"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tables, tmp_path):
    """A copy of what the script reads and writes, with all markers, and up to date."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results", ignore=shutil.ignore_patterns("*.svg"))
    (tmp_path / "docs").mkdir()
    for page in {page for page, _ in tables.TABLES}:
        blocks = [f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for of, name in tables.TABLES if of == page]
        (tmp_path / page).write_text("\n".join(["Before.\n", *blocks, "After.\n"]))
    assert tables.update(tmp_path, check=False) == []
    assert tables.update(tmp_path, check=True) == []
    return tmp_path


def test_the_docs_are_up_to_date():
    found = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def cells(tree, page, first):
    """The cells of the row that begins so."""
    (row,) = [line for line in (tree / page).read_text().splitlines() if line.startswith(f"| {first} |")]
    return row.strip("| ").split(" | ")


def test_costs_are_those_of_the_results_under_their_former_names(tree):
    (case,) = [
        case for case in json.loads((RESULTS / "overhead-cpu.json").read_text())["cases"] if case["model"] == "resnet18"
    ]
    ratios = {row["method"]: row["ratio"] for row in case["rows"]}
    for former, name in {**FORMER_NAMES, "sam": "sam"}.items():
        if name not in ("late_sam", "ae_sam", "look_sam"):
            assert cells(tree, "docs/methods.md", f"`{name}`")[4].startswith(f"{ratios[former]:.2f}x (")
    late = cells(tree, "docs/methods.md", "`late_sam`")[4]
    assert late.startswith(f"{0.2 * ratios['latesam'] + 0.8 * 1.0133832158075522:.2f}x (")
    assert cells(tree, "docs/methods.md", "`ae_sam`")[4] == "1.00x to 2.14x (1.02x to 2.03x)"
    assert cells(tree, "docs/methods.md", "`mesa`")[4] == "1.32x (1.50x); 1.10x with `fraction=0.25`"
    assert cells(tree, "README.md", "wrong labels")[2] == "1.10x"


def test_every_method_has_its_row(tree):
    text = (tree / "docs" / "methods.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(METHODS)
    assert text.startswith("Before.\n\n<!-- methods:begin -->\n| method |")
    assert text.endswith(" |\n<!-- methods:end -->\n\nAfter.\n")
    assert (tree / "README.md").read_text().count("x | `") == 5


@pytest.mark.parametrize("page", ["docs/methods.md", "README.md", "docs/comparison.md"])
def test_a_number_that_was_changed_by_hand_is_noticed(tables, tree, page):
    path = tree / page
    path.write_text(re.sub(r"2\.0\dx", "2.99x", path.read_text(), count=1))
    assert [line.partition(":")[0] for line in tables.update(tree, check=True)] == [page]
    assert "2.99x" in path.read_text()
    tables.update(tree, check=False)
    assert tables.update(tree, check=True) == []


def test_a_result_that_has_changed_is_noticed(tables, tree):
    path = tree / "benchmarks" / "results" / "overhead-cpu.json"
    result = json.loads(path.read_text())
    for case in result["cases"]:
        for row in case["rows"]:
            row["ratio"] *= 1 + 0.1 * (row["method"] == "sam")
    path.write_text(json.dumps(result))
    assert [line.partition(":")[0] for line in tables.update(tree, check=True)] == ["docs/methods.md", "README.md"]


def test_a_card_that_has_changed_is_noticed(tables, tree, monkeypatch):
    monkeypatch.setattr(tables, "METHODS", {name: METHODS[name] for name in list(METHODS)[1:]})
    assert [line.partition(":")[0] for line in tables.update(tree, check=True)] == ["docs/methods.md"]


def test_a_page_whose_markers_are_gone_is_noticed(tables, tree):
    path = tree / "docs" / "methods.md"
    path.write_text(path.read_text().replace("<!-- methods:end -->", ""))
    for check in (True, False):
        assert "there are no markers" in tables.update(tree, check=check)[0]


def test_what_is_said_of_the_rho_of_sam_on_is_what_was_chosen():
    chosen = set()
    for path in RESULTS.glob("rivals-*.json"):
        for each in json.loads(path.read_text())["selection"]["candidates"]:
            if each["method"] == "samon" and each["chosen"]:
                chosen.add(each["label"].partition("rho=")[2])
    assert METHODS["sam_on"].choose.endswith(f"our comparisons chose {' and '.join(sorted(chosen))}")
