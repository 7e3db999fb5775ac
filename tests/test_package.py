"""The rules of the house: the public API, who imports whom, and that importing flatmin is light."""

import ast
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin

ROOT = Path(flatmin.__file__).parent
PUBLIC = [
    "flatmin",
    *(
        f"flatmin.{name}"
        for name in ("averages", "data", "history", "losses", "models", "optim", "report", "sharpness")
    ),
]
# Who may import what of flatmin, by the first folder or file under src/flatmin.
ALLOWED = {
    "errors": set(),
    "_checks": {"errors"},
    "history": {"errors", "_checks"},
    "optim": {"errors", "_checks"},
    "data": {"errors", "_checks"},
    "models": {"errors", "_checks"},
    "averages": {"errors", "_checks"},
    "sharpness": {"errors", "_checks"},
    "losses": {"errors", "_checks", "averages", "history"},
    "engine": {"averages", "errors", "_checks", "history", "optim", "data", "models", "sharpness", "losses"},
    "report": {"errors", "_checks"},
    "cli": {
        "report",
        "",
        "averages",
        "errors",
        "_checks",
        "history",
        "optim",
        "data",
        "models",
        "sharpness",
        "losses",
        "engine",
    },
    "__init__": {"averages", "data", "errors", "history", "losses", "models", "optim", "sharpness"},
    "__main__": {"cli"},
}
LAZY = {
    "engine",
    "report",
    "cli",
    "__main__",
}  # may import the extras' packages; all else torch and the standard library


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_each_symbol_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    imported = {alias for alias in vars(module) if not alias.startswith("_")}
    submodules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    assert set(module.__all__) <= imported
    assert imported - set(module.__all__) <= submodules
    for symbol in module.__all__:
        assert inspect.getdoc(getattr(module, symbol)), symbol


def _absolute(name: str) -> tuple[str, bool]:
    first, *rest = name.split(".")
    return (rest[0] if rest else "", True) if first == "flatmin" else (first, False)


def imports(path: Path) -> list[tuple[str, bool]]:
    """All modules that a file imports, with whether they are flatmin's own, as the first part of their name."""
    found = []
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [_absolute(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(_absolute(node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.level == depth:  # from the package's root
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found += [
                (name if (ROOT / name).exists() or (ROOT / f"{name}.py").exists() else "", True) for name in names
            ]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name, own in imports(path):
        if own:
            assert name in ALLOWED[layer], f"{layer} must not import {name}"
        else:
            light = name in ("torch", "typing_extensions") or name in sys.stdlib_module_names  # torch needs the latter
            assert light or layer in LAZY, f"{layer} must not import {name}; use errors.require where it is needed"


def test_importing_flatmin_loads_no_third_party_but_torch() -> None:
    code = "import sys, torch; before = set(sys.modules); import flatmin; print(*(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in new}
    assert "flatmin" in packages
    assert packages - {"flatmin", "torch"} <= set(sys.stdlib_module_names)


def test_version_is_the_installed_one() -> None:
    assert flatmin.__version__ == importlib.metadata.version("flatmin")
