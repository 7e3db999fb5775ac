"""The benchmarks stand on what is public: no module, name or attribute of flatmin's that begins with an underscore."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
OWN = {"self", "cls", "torch"}  # torch._foreach_* are torch's own


def private(source: str) -> list[str]:
    """What a source takes from others that is not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            names = [node.attr]
        else:
            continue
        found += [name for name in names if name.startswith("_") and not name.endswith("__")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_private_is_used(path: Path) -> None:
    assert private(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from flatmin.lab.cli._options import parse_settings",
        "from flatmin.lab.cli import _options",
        "import flatmin.optim._step",
        "flatmin.optim._step.x",
        "optimizer._when",
    ],
)
def test_what_is_private_is_noticed(source: str) -> None:
    assert len(private(source)) == 1
