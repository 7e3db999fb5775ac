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
    for page in {page for page, _ in tables.TABLES}:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        blocks = [f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for of, name in tables.TABLES if of == page]
        (tmp_path / page).write_text("\n".join(["Before.\n", *blocks, "After.\n"]))
    assert tables.update(tmp_path, check=False) == []
    assert tables.update(tmp_path, check=True) == []
    return tmp_path


def test_the_docs_are_up_to_date():
    found = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


METHODS_PAGE = "docs/methods/README.md"


def cells(tree, page, first):
    """The cells of the row whose first cell is this, a link or not."""
    row = re.compile(rf"\| \[?{re.escape(first)}(\]\(\S+\))? \|")
    (found,) = [line for line in (tree / page).read_text().splitlines() if row.match(line)]
    return found.strip("| ").split(" | ")


def cost(tree, name):
    return cells(tree, METHODS_PAGE, f"`{name}`")[3]


def test_costs_are_those_of_the_results_under_their_former_names(tree):
    (case,) = [
        case for case in json.loads((RESULTS / "overhead-cpu.json").read_text())["cases"] if case["model"] == "resnet18"
    ]
    ratios = {row["method"]: row["ratio"] for row in case["rows"]}
    for former, name in {**FORMER_NAMES, "sam": "sam"}.items():
        if name not in ("late_sam", "ae_sam", "look_sam"):
            assert cost(tree, name).startswith(f"{ratios[former]:.2f}x (")
    late = cost(tree, "late_sam")
    assert late.startswith(f"{0.2 * ratios['latesam'] + 0.8 * 1.0133832158075522:.2f}x (")
    assert cost(tree, "ae_sam") == "1.00x to 2.14x (1.02x to 2.03x)"
    assert cost(tree, "mesa") == "1.32x (1.50x); 1.10x with `fraction=0.25`"
    assert cells(tree, "README.md", "streams of data, or mixup")[2] == "1.10x"


def test_every_method_has_its_row(tree):
    text = (tree / METHODS_PAGE).read_text()
    assert re.findall(r"^\| \[?`(\w+)`", text, re.MULTILINE) == list(METHODS)
    assert text.startswith("Before.\n\n<!-- methods:begin -->\n| method |")
    assert text.endswith("\n<!-- methods:end -->\n\nAfter.\n")
    assert (tree / "README.md").read_text().count("x | `") == 5


@pytest.mark.parametrize(
    "page", ["docs/methods/README.md", "README.md", "docs/findings/comparison.md", "docs/methods/sam.md"]
)
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
    stale = {line.partition(":")[0] for line in tables.update(tree, check=True)}
    assert stale == {"README.md", "docs/choose.md", METHODS_PAGE, "docs/methods/sam.md"}


def test_a_card_that_has_changed_is_noticed(tables, tree, monkeypatch):
    monkeypatch.setattr(tables, "METHODS", {name: METHODS[name] for name in list(METHODS)[1:]})
    assert [line.partition(":")[0] for line in tables.update(tree, check=True)] == [METHODS_PAGE]


def test_a_page_whose_markers_are_gone_is_noticed(tables, tree):
    path = tree / METHODS_PAGE
    path.write_text(path.read_text().replace("<!-- methods:end -->", ""))
    for check in (True, False):
        assert "there are no markers" in tables.update(tree, check=check)[0]


def test_what_is_said_of_the_cheap_methods_is_what_came_out(tables):
    comparisons = [
        sorted(points[1:], key=lambda point: -point.difference) for _, points in tables.results.comparisons(ROOT)
    ]

    def beyond_noise(method):
        return sum(point.method == method and point.p_value < 0.05 for points in comparisons for point in points)

    numbers = ("no", "one", "two", "three", "four", "five")
    assert all("logit_squeezing" in [point.method for point in points[:2]] for points in comparisons)
    squeezing, smoothing = (numbers[beyond_noise(method)] for method in ("logit_squeezing", "smoothing"))
    readme = (ROOT / "README.md").read_text()
    assert f"First or second on all {numbers[len(comparisons)]} small data sets, beyond noise on {squeezing}:" in readme
    page = " ".join((ROOT / "docs/findings/comparison.md").read_text().split())
    assert (
        f"beyond noise on {squeezing} of five. Label smoothing, as cheap, gains less, but beyond noise on {smoothing}."
        in page
    )


def test_what_is_said_of_the_rho_of_sam_on_is_what_was_chosen():
    chosen = set()
    for path in RESULTS.glob("rivals-*.json"):
        for each in json.loads(path.read_text())["selection"]["candidates"]:
            if each["method"] == "samon" and each["chosen"]:
                chosen.add(each["label"].partition("rho=")[2])
    assert METHODS["sam_on"].choose.endswith(f"our comparisons chose {' and '.join(sorted(chosen))}")
