"""The rules of the house: the public API, who imports whom, and that importing flatmin is light."""

import ast
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import flatmin

ROOT = Path(flatmin.__file__).parent
PUBLIC = [
    "flatmin",
    *(
        f"flatmin.integrations.{name}"
        for name in ("accelerate", "lightning", "opacus", "timm", "torchao", "transformers")
    ),
    *(f"flatmin.{name}" for name in ("averages", "history", "indices", "losses", "optim", "sharpness")),
    "flatmin.lab",
    *(f"flatmin.lab.{name}" for name in ("methods", "problems.data", "problems.models", "report", "results")),
]
# Who may import what of flatmin, by the room: the first folder or file under src/flatmin, in the laboratory and among
# the integrations the second.
SHARED = {
    "errors",
    "_attached",
    "_checks",
    "_distributed",
    "_files",
    "_interrupts",
    "_passes",
    "_privacy",
    "_rng",
    "_walk",
    "_warn",
}
LIBRARY = {"averages", "history", "indices", "losses", "optim", "sharpness"}
# What an integration's package needs itself.
BROUGHT_BY = {"integrations/lightning": ("torchmetrics",), "integrations/transformers": ("accelerate",)}
RESULTS = {"errors", "_files", "lab/results"}
PROBLEMS = {*SHARED, *LIBRARY, "lab/recipe", "lab/problems"}
METHODS = {*SHARED, *LIBRARY, "integrations/opacus", "lab/methods"}
TRAINING = {*PROBLEMS, *METHODS, "lab/training"}
RUNS = {*TRAINING, *RESULTS, "lab/runs"}
REPORT = {*RESULTS, "_interrupts", "lab/report"}
COMPARISON = {*RUNS, *REPORT, "lab/comparison"}
ALLOWED = {
    "errors": set(),
    "_attached": {"errors", "_checks", "_warn"},
    "_checks": {"errors"},
    "_distributed": {"errors", "_checks"},
    "_files": {"errors", "_checks", "_interrupts"},
    "_interrupts": set(),
    "_command": {"_interrupts"},
    "_passes": set(),
    "_privacy": {"errors"},
    "_rng": {"errors", "_checks"},
    "_walk": set(),
    "_warn": set(),
    "history": SHARED,
    "optim": SHARED,
    "averages": SHARED,
    "sharpness": SHARED,
    "indices": SHARED,
    "integrations/__init__": set(),
    "integrations/accelerate": {*SHARED, *LIBRARY},
    "integrations/lightning": {*SHARED, *LIBRARY},
    "integrations/opacus": {*SHARED, *LIBRARY},
    "integrations/timm": {*SHARED, *LIBRARY},
    "integrations/torchao": {*SHARED, *LIBRARY},
    "integrations/transformers": {*SHARED, *LIBRARY},
    "losses": {*SHARED, "averages", "history"},
    "lab/__init__": COMPARISON,
    "lab/recipe": SHARED,
    "lab/results": RESULTS,
    "lab/problems": PROBLEMS,
    "lab/methods": METHODS,
    "lab/training": TRAINING,
    "lab/runs": RUNS,
    "lab/comparison": COMPARISON,
    "lab/report": REPORT,
    "lab/cli": {*COMPARISON, "", "_command", "lab/cli"},
    "__init__": {"errors", "_command", *LIBRARY},
    "__main__": {"_command", "lab/cli"},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_each_symbol_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    imported = {alias for alias in vars(module) if not alias.startswith("_")}
    submodules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    assert set(module.__all__) <= imported
    assert imported - set(module.__all__) <= submodules
    for symbol in module.__all__:
        value = getattr(module, symbol)
        assert inspect.getdoc(value) or isinstance(value, Mapping), symbol  # the module says what is in a mapping


def room(path: Path) -> str:
    """The room that a file or folder under src/flatmin belongs to; the empty string for the package itself."""
    parts = [part.removesuffix(".py") for part in path.relative_to(ROOT).parts]
    return "/".join(parts[:2] if len(parts) > 1 and parts[0] in ("lab", "integrations") else parts[:1])


def imports(path: Path) -> list[tuple[str, bool]]:
    """What a file imports: rooms of flatmin's, with True, and other packages' names, with False."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name.split("."), []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["flatmin", *path.relative_to(ROOT).parts[: -node.level]] if node.level else []
            names = [([*above, *(node.module or "").split(".")], [alias.name for alias in node.names])]
        else:
            continue
        for module, inner in names:
            parts = [part for part in module if part]
            if parts[0] != "flatmin":
                found.append((parts[0], False))
                continue
            base = ROOT.joinpath(*parts[1:])
            modules = [base / n for n in inner if (base / n).is_dir() or (base / f"{n}.py").exists()]
            found += [(room(each), True) for each in modules or [base]]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path: Path) -> None:
    here = room(path)
    for name, own in imports(path):
        if own:
            assert name in ALLOWED[here] | {here}, f"{here} must not import {name}"
        else:
            light = name in ("torch", "typing_extensions") or name in sys.stdlib_module_names  # torch needs the latter
            theirs = here.startswith("integrations/") and name in (here.split("/")[1], *BROUGHT_BY.get(here, ()))
            theirs = theirs or (name == "triton" and path.name == "_saf_kernel.py")  # comes with torch for GPUs
            allowed = light or theirs or here.startswith("lab/") or here == "__main__"
            assert allowed, f"{here} must not import {name}; use errors.require where it is needed"


def test_the_rooms_are_those_that_there_are() -> None:
    assert {room(path) for path in ROOT.rglob("*.py")} == set(ALLOWED)


def modules_at_import(path: Path) -> set[Path]:
    """The files of flatmin that a file imports when it is imported itself; packages stand for their ``__init__``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in (alias.name for alias in node.names):
                inner = base / name
                module = inner if inner.is_dir() or inner.with_suffix(".py").exists() else base
                found.add(module / "__init__.py" if module.is_dir() else module.with_suffix(".py"))
    return found


def test_no_circle_between_files() -> None:
    ahead = {path: modules_at_import(path) for path in ROOT.rglob("*.py")}
    assert all(imported in ahead for found in ahead.values() for imported in found)
    while free := {path for path, found in ahead.items() if not found & ahead.keys()}:
        ahead = {path: found for path, found in ahead.items() if path not in free}
    assert not ahead, f"these import one another: {sorted(str(path.relative_to(ROOT)) for path in ahead)}"


@pytest.mark.parametrize("name", ["results", "report"])
def test_what_reads_results_needs_no_torch(name: str) -> None:
    """In a process without torch, with empty packages in place of ``flatmin`` and ``flatmin.lab``."""
    code = (
        "import importlib, sys, types; sys.modules['torch'] = None\n"
        f"for name, path in (('flatmin', {str(ROOT)!r}), ('flatmin.lab', {str(ROOT / 'lab')!r})):\n"
        "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [path]\n"
        f"before = set(sys.modules); importlib.import_module('flatmin.lab.{name}')\n"
        "print(*(set(sys.modules) - before))"
    )
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in new}
    assert f"flatmin.lab.{name}" in new
    assert packages - {"flatmin"} <= set(sys.stdlib_module_names)


def test_importing_the_laboratory_loads_nothing_that_only_the_command_or_the_report_needs() -> None:
    code = "import sys, flatmin; print('flatmin.lab' in sys.modules); import flatmin.lab; print(*sys.modules)"
    first, new = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert first == "False"
    assert "flatmin.lab.comparison.compare" in new.split()
    assert not {"rich", "typer", "plotly", "jinja2", "matplotlib", "flatmin.lab.cli"} & set(new.split())


def test_importing_flatmin_loads_no_third_party_but_torch() -> None:
    code = "import sys, torch; before = set(sys.modules); import flatmin; print(*(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in new}
    assert "flatmin" in packages
    assert packages - {"flatmin", "torch"} <= set(sys.stdlib_module_names)


def test_version_is_the_installed_one() -> None:
    assert flatmin.__version__ == importlib.metadata.version("flatmin")
