"""Everything in README and docs that can be run is run: Python, command lines, links; and the words are checked.

Blocks run with stand-ins for what they take from around them: a small network, its data, an optimizer.
"""

import ast
import copy
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.lab import cli
from flatmin.lab.cli._shared import app
from flatmin.lab.methods.registry import METHODS, get_method, resolve_settings
from flatmin.lab.methods.settings import parse_settings
from tests.registry import restored

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"))]


class Block(NamedTuple):
    """A fenced block: of which page, from which line on, in which language."""

    page: str
    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(str(page.relative_to(ROOT)), text[: found.start()].count("\n") + 1, *found.groups())
        for found in re.finditer(r"^```(\w*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


def python_of(page: str) -> list[Block]:
    return [block for block in PYTHON if block.page == page]


def test_all_blocks_are_found() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert fences[::2] == [block.language for block in BLOCKS if block.page == str(page.relative_to(ROOT))]
        assert set(fences[::2]) <= {"python", "sh"}, page.name
        assert not any(fences[1::2]), page.name


# The pages whose code another file of tests runs, with what it takes for granted.
ELSEWHERE = {
    f"docs/plug-in/{name}.md": f"tests/integrations/test_{name}{pages}.py"
    for name, pages in (
        *((name, "_pages") for name in ("accelerate", "lightning", "opacus", "transformers")),
        *((name, "") for name in ("timm", "torchao")),
    )
}


def test_all_code_is_run() -> None:
    """Each page with Python on it is run here or in another file of tests, which names it."""
    here = {"README.md", *TRAINING, *HISTORIES, *STEPS, *SHARPNESS, *LABORATORY, QUICKSTART}
    assert {block.page for block in PYTHON} == here | set(ELSEWHERE)
    for page, tests in ELSEWHERE.items():
        assert Path(page).name in (ROOT / tests).read_text(), page


def surroundings(folder: Path | None = None, num_classes: int = 10) -> dict[str, object]:
    """What the pages take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, num_classes))
    x, y, criterion = torch.randn(12, 4), torch.randint(num_classes, (12,)), nn.CrossEntropyLoss()
    train_set = TensorDataset(x, y)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    known = {"torch": torch, "F": F, "flatmin": flatmin, "model": model, "base": base, "x": x, "y": y}
    known |= {"parts": list(zip(x.chunk(3), y.chunk(3), strict=True)), "batches": [(x, y)], "folder": folder}
    known |= {"train_set": train_set, "loader": DataLoader(train_set, batch_size=4, shuffle=True), "epochs": 7}
    known |= {"criterion": criterion, "optimizer": flatmin.SAM(base, rho=0.05), "num_classes": num_classes}
    known |= {"logits": model(x), "decay": 0.9}

    def closure() -> torch.Tensor:
        known["optimizer"].zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    return known | {"closure": closure}


def run(code: str, known: dict[str, object], name: str) -> None:
    exec(compile(code, name, "exec"), known)


# README


def test_the_readme_has_at_most_90_lines() -> None:
    assert len(README.read_text().splitlines()) <= 90


def test_the_snippets_of_the_readme_have_at_most_six_lines() -> None:
    assert [len(block.code.splitlines()) <= 6 for block in python_of("README.md")] == [True] * 3


@pytest.mark.parametrize("block", [python_of("README.md")[0], python_of("README.md")[2]], ids=named)
def test_the_losses_of_the_readme_train(block: Block) -> None:
    """With the lines that the README leaves to the reader; the penalty is at work in the last epoch."""
    known = surroundings()
    known["optimizer"] = known["base"]
    before = copy.deepcopy(known["model"].state_dict())
    indent = re.match(" *", block.code.splitlines()[-1]).group()
    rest = ["logits = model(x)", "optimizer.zero_grad()", "loss.backward()", "optimizer.step()"]
    run(block.code + "".join(f"{indent}{line}\n" for line in rest), known, named(block))
    assert known["loss"] > known["criterion"](known["logits"], known["y"])
    assert not torch.equal(before["0.weight"], known["model"].state_dict()["0.weight"])


def test_the_wrapper_of_the_readme_makes_two_passes() -> None:
    block, known, passes = python_of("README.md")[1], surroundings(), []
    before = copy.deepcopy(known["model"].state_dict())
    known["model"].register_forward_pre_hook(lambda *_: passes.append(1))
    run(block.code, known, named(block))
    assert len(passes) == 2 * len(known["loader"])
    assert not torch.equal(before["0.weight"], known["model"].state_dict()["0.weight"])


def marked(page: Path, name: str) -> list[list[str]]:
    """The rows of the table between two markers, cell by cell."""
    text = page.read_text()
    assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") == 1
    table = text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_each_line_to_write_can_be_written() -> None:
    rows = marked(README, "which")
    assert len(rows) == 5
    for row in rows:
        known = surroundings()
        known["optimizer"] = known["base"]
        (line,) = re.findall("`(.+)`", row[-1])
        run(line, known, line)
        made = known[line.partition(" = ")[0]]
        assert isinstance(made, (torch.Tensor, flatmin.MESA, flatmin.SAM, flatmin.SAF)), line


def test_a_skimmer_finds_the_methods_and_the_two_commands() -> None:
    text = README.read_text()
    assert text.index("## Which one?") < text.index("```python")
    commands = re.findall(r"^ {4}(.+?)(?:  |$)", text, re.MULTILINE)
    assert {"make demo", "make test", "flatmin compare my_experiment.py"} <= set(commands)


def test_the_table_of_methods_has_every_method_of_the_command() -> None:
    first = [re.findall(r"`(\w+)`", row[0]) for row in marked(ROOT / "docs" / "methods" / "README.md", "methods")]
    assert sorted(name for names in first for name in names) == sorted(METHODS)


# Python in docs

QUICKSTART = "docs/quickstart.md"
HISTORIES = ("docs/methods/history.md", "docs/extend/codec.md")
SHARPNESS = ("docs/check/sharpness.md",)
STEPS = tuple(f"docs/plug-in/{name}.md" for name in ("accumulation", "amp", "foreign-loop", "loop", "one-pass"))
LABORATORY = ("docs/check/experiment.md", "docs/check/python.md", "docs/extend/method.md")
TRAINING = tuple(
    page
    for page in dict.fromkeys(block.page for block in PYTHON)
    if (page.startswith(("docs/methods/", "docs/findings/")) or page == "docs/plug-in/indices.md")
    and page not in HISTORIES
)


def python_on(pages: tuple[str, ...]) -> list[Block]:
    return [block for page in pages for block in python_of(page)]


def test_the_quickstart_learns() -> None:
    (block,) = python_of(QUICKSTART)
    known: dict[str, object] = {}
    run(block.code, known, named(block))
    assert known["squeezed"] - known["without"] > 0.06


@pytest.mark.parametrize("block", python_on(TRAINING), ids=named)
def test_the_code_for_a_method_runs(block: Block) -> None:
    known = surroundings()
    run(block.code, known, named(block))
    if "loss" in known:  # a loss that is added to the criterion has to add something
        assert known["loss"] != known["criterion"](known["logits"], known["y"])


@pytest.mark.parametrize("block", python_on(HISTORIES), ids=named)
def test_the_code_for_a_history_runs(block: Block, tmp_path: Path) -> None:
    known = surroundings(tmp_path, num_classes=128)  # a low rank is for many classes
    run(block.code, known, named(block))
    assert 0 < known["saf"].history.nbytes < 3 * 12 * (4 * 128 + 4)  # less than dense
    for epoch in range(9):  # the last is the first that has a past, 3 epochs back from epoch 5 on
        known["saf"].set_epoch(epoch)
        loss = known["saf"](torch.randn(12, 128, requires_grad=True), torch.arange(12))
    assert 0 < loss < 100


@pytest.mark.parametrize("block", python_on(SHARPNESS), ids=named)
def test_the_code_for_sharpness_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    run(block.code, surroundings(), named(block))
    first, second = capsys.readouterr().out.splitlines()
    assert len(set(map(float, first.split()))) == 2
    assert second.count(",") == 2


@pytest.fixture(autouse=True)
def registry():
    """What a page registers is gone after its test."""
    with restored():
        yield


@pytest.fixture
def on_the_cpu(monkeypatch):
    """What is asked of an accelerator is done by the CPU, which has float16 and a scaler too."""
    autocast, scaler = torch.autocast, torch.amp.GradScaler

    class Scaler(scaler):
        def __init__(self) -> None:
            super().__init__("cpu", init_scale=2.0**10)

    monkeypatch.setattr(torch, "autocast", lambda _, dtype: autocast("cpu", dtype))
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)


OPTIMIZERS = python_on(STEPS)
ONE_PASS = [block for block in OPTIMIZERS if "flatmin.MSAM" in block.code]


@pytest.mark.parametrize("block", ONE_PASS, ids=named)
def test_the_loop_of_a_one_pass_method_is_that_of_its_closure(block: Block) -> None:
    known, plain = surroundings(), surroundings()
    torch.manual_seed(1)
    run(block.code, known, named(block))
    optimizer, model = flatmin.MSAM(plain["base"], rho=3.0), plain["model"]
    torch.manual_seed(1)
    for x, y in plain["loader"]:
        optimizer.step(lambda x=x, y=y: (optimizer.zero_grad(), F.cross_entropy(model(x), y).backward()))
    for ours, theirs in zip(known["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", [block for block in OPTIMIZERS if block not in ONE_PASS], ids=named)
def test_the_code_makes_the_step_that_a_closure_makes(block: Block, on_the_cpu) -> None:
    code, known, plain = block.code, surroundings(num_classes=3), surroundings(num_classes=3)
    plain["optimizer"].step(plain["closure"])
    before, passes = copy.deepcopy(known["model"].state_dict()), []
    known["model"].register_forward_pre_hook(lambda *_: passes.append(1))
    run(code, known, named(block))
    if not passes:  # it only says what the closure is, or the optimizer
        known["optimizer"].step(known["closure"])
    assert len(passes) == (2 * len(known["parts"]) if "parts" in code else 2)
    assert known["optimizer"].skipped_steps == 0
    loose = {"rtol": 1e-2, "atol": 1e-3} if "float16" in code else {"rtol": 1e-5, "atol": 1e-6}
    for name, weight in known["model"].state_dict().items():
        torch.testing.assert_close(weight, plain["model"].state_dict()[name], **loose)
        assert (weight - before[name]).abs().max() > 3e-3


EXPERIMENT, FROM_PYTHON, OWN_METHOD = python_on(LABORATORY)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The experiment file of docs/check/experiment.md, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "documented.py"
    path.write_text(EXPERIMENT.code)
    yield path
    sys.modules.pop("documented", None)


def test_the_experiment_file_trains(experiment: Path) -> None:
    assert cli.run(["train", str(experiment), "--method", "base", "--epochs", "1", "--out", "run"]) == 0
    assert Path("run/metrics.jsonl").exists()


def test_the_laboratory_is_used_from_python(experiment: Path, tmp_path: Path) -> None:
    experiment.rename("my_experiment.py")
    code = FROM_PYTHON.code
    for given, small in (
        ("epochs=30", "epochs=2"),
        ("seeds=5", "seeds=1, minutes=0.1, jobs=1"),
        ("points=21", "points=3"),
    ):
        assert given in code
        code = code.replace(given, small)
    Path("script.py").write_text(code)
    found = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "logit_squeezing" in found.stdout
    assert Path("both/results.json").exists()
    for name in ("metrics.jsonl", "sharpness.json", "landscape.json"):
        assert Path("saf", name).exists(), name


def test_a_method_of_ones_own_trains_from_an_experiment_file(experiment: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flatmin"])
    experiment.write_text(EXPERIMENT.code + "\n\n" + OWN_METHOD.code)
    (name,) = re.findall(r'^ +(?:name=)?"(\w+)"', OWN_METHOD.code, re.MULTILINE)[:1]
    assert cli.run(["train", str(experiment), "--method", name, "--epochs", "1", "--out", "run"]) == 0
    assert Path("run/metrics.jsonl").exists()


# Command lines


def command_lines() -> list[tuple[str, str]]:
    """Each command line of the pages, in a block or between backticks, without its comment."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(page) if block.language == "sh" for line in block.code.splitlines()]
        lines += re.findall(r"^ {4}((?:flatmin|pip|make|python|torchrun) .*)$", text, re.MULTILINE)
        lines += [" ".join(line.split()) for line in re.findall(r"(?<!`)`((?:flatmin|pip|make|python) [^`]+)`", text)]
        found += [(str(page.relative_to(ROOT)), re.sub(r" +# .*$", "", line)) for line in lines if line.strip()]
    return sorted(set(found))


LINES = command_lines()
FLATMIN = [(page, line) for page, line in LINES if re.match(r"(torchrun .* -m )?flatmin ", line)]


@pytest.mark.parametrize(("page", "line"), FLATMIN, ids=[f"{page}: {line}" for page, line in FLATMIN])
def test_the_command_takes_the_line(page: str, line: str) -> None:
    words = shlex.split(line.partition("flatmin ")[2])
    group = typer.main.get_command(app)
    with group.make_context("flatmin", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        with command.make_context(name, rest, parent=context) as inner:
            given = inner.params
    for method in (given.get("methods") or given.get("method") or "base").split(","):
        get_method(method.strip())
    for setting in given.get("set_") or []:
        for method, tried in parse_settings([setting]).items():
            for hyperparameter, values in tried.items():
                for value in values:
                    resolve_settings(get_method(method), {hyperparameter: value}, epochs=60)
    if given.get("experiment") and "/" in given["experiment"]:
        assert (ROOT / given["experiment"]).exists()


OTHERS = [(page, line) for page, line in LINES if (page, line) not in FLATMIN]


@pytest.mark.parametrize(("page", "line"), OTHERS, ids=[f"{page}: {line}" for page, line in OTHERS])
def test_what_is_called_or_installed_is_there(page: str, line: str) -> None:
    word, *rest = shlex.split(line)
    if word == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif word == "python":
        assert (ROOT / rest[0]).exists()
    else:
        assert (word, rest[0]) == ("pip", "install")
        project = (ROOT / "pyproject.toml").read_text()
        extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n\[", project, re.DOTALL).group(1)
        assert re.fullmatch(r"\.|torch|(\.|flatmin|\./flatmin-[\d.]+-py3-none-any\.whl)\[[\w,]+\]", rest[1])
        for extra in re.findall(r"\w+", rest[1].partition("[")[2]):
            assert re.search(rf"^{extra} = ", extras, re.MULTILINE), extra


# Links and words


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        generated = "docs/api/" in str(target)  # by mkdocstrings: the strict build finds those
        assert not anchor or generated or anchor in anchors(target), link


WORDS = {
    r"\bLikewise\b\.?": "say what is meant",
    r"\bto the bit\b": "bit-identical",
    r"\bnetwork sa(?:id|ys)\b": "logits, or past predictions",
    r"\b(?:not|that|which) pays?\b|\bpays? for a second pass\b": "the second pass runs",
    r"\bsaid once\b": "warned once",
    r"(?<![\w.)\]])\.\d": "0.05",
    r"\d\.\d+ x\b": "1.01x",
}


def stumbles(text: str) -> list[str]:
    return [
        f"line {text[: found.start()].count(chr(10)) + 1}: {found.group()!r}, better: {better}"
        for pattern, better in WORDS.items()
        for found in re.finditer(pattern, text)
    ]


def test_the_words_are_noticed() -> None:
    text = "Likewise. Equal to the bit. What the network said. A step that does not pay. At .05 and 1.01 x; said once."
    assert len(stumbles(text)) == len(WORDS)
    assert not stumbles("likewise; 0.05, 1.01x, 3 x 3, v1.2, ../a.1, f(x).5, 1, ..., 2")


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    found = stumbles(page.read_text())
    assert found == []


def public_docstrings(path: Path) -> str:
    """A file's text with all but its public docstrings blanked out, line by line."""
    lines, kept = path.read_text().splitlines(), set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name.startswith("_") and node.name[:2] != "__":
            continue
        if ast.get_docstring(node) is not None:
            kept |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if not isinstance(node, ast.FunctionDef):
            nodes += [inner for inner in node.body if isinstance(inner, (ast.ClassDef, ast.FunctionDef))]
    return "\n".join(line if number in kept else "" for number, line in enumerate(lines, start=1))


SOURCES = [*sorted((ROOT / "src" / "flatmin").rglob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_docstrings_use_the_words_of_the_field(path: Path) -> None:
    found = stumbles(public_docstrings(path))
    assert found == []
