"""timm itself and the torchvision that it needs, of a folder that nothing else imports from.

transformers, torchmetrics and others use torchvision as soon as they find it, so that it is no part of the environment.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "timm"
NAMES = ("timm", "torchvision")
_library: list[torch.library.Library] = []  # what it declares is gone with it


@contextmanager
def importable() -> Iterator[ModuleType]:
    """Inside, timm is imported and can be; outside, nothing finds it or its torchvision."""
    if not FOLDER.is_dir():
        pytest.skip(f"timm is not in {FOLDER}: make test puts it there")
    sys.modules.update(_modules())
    try:
        yield sys.modules["timm"]
    finally:
        _taken_out()


@cache
def _modules() -> dict[str, ModuleType]:
    sys.path.append(str(FOLDER))
    try:
        _import_torchvision()
        for part in ("data", "optim", "task", "utils"):
            import_module(f"timm.{part}")
    finally:
        sys.path.remove(str(FOLDER))
        found = _taken_out()
    return found


def _import_torchvision() -> None:
    """Beside a torch for which it was not built its operations do not load; timm needs none, only that two be known."""
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _taken_out()  # what is imported by half
        _library.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _library[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in NAMES]
    return {name: sys.modules.pop(name) for name in names}
