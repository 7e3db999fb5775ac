"""Experiment files: Python files that define a network and its data sets."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import SOURCE_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from ..._files import LARGEST_SETUP, read_bytes
from ..._rng import seed_all
from ...errors import DataError, ExperimentError
from ..recipe import Recipe
from .problem import Problem, base_optimizer, check_size, class_numbers, with_noise


def from_experiment(path: Path, recipe: Recipe, seed: int) -> Problem:
    """Runs the file and makes the problem that it defines.

    Raises:
        ExperimentError: If it cannot be used; the message names the file, and the line where it has raised.
    """
    seed_all(seed)  # before anything of the file runs: a split it draws must be that of all methods with this seed
    module = _import(path)
    for name in ("model", "train_set", "test_set"):
        if not callable(getattr(module, name, None)):
            raise ExperimentError(
                f"{path}: there is no function {name}(); an experiment file defines model(), train_set() and "
                "test_set(), and if it likes criterion() and optimizer(parameters)"
            )
    train, test = _call(path, module.train_set), _call(path, module.test_set)
    for name, dataset in (("train_set", train), ("test_set", test)):
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise ExperimentError(
                f"{path}: {name}() must return a map-style data set (with __getitem__ and __len__), "
                f"got {type(dataset).__name__}"
            )
        if len(dataset) == 0:
            raise ExperimentError(f"{path}: {name}() returned an empty data set")
    check_size(f"{path}: train_set()", train)
    num_classes = _count_classes(path, _call(path, module.model), train)
    criterion = _call(path, module.criterion) if hasattr(module, "criterion") else None
    if criterion is not None and not callable(criterion):
        raise ExperimentError(f"{path}: criterion() must return a function of (logits, y), got {criterion!r}")

    if hasattr(module, "optimizer"):
        for name in ("optimizer", "lr", "momentum", "weight_decay"):
            if getattr(recipe, name) != getattr(Recipe, name):
                raise ExperimentError(f"{path} has its own optimizer(), so {name} is set there and not as an option")

    def make_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        if not hasattr(module, "optimizer"):
            return base_optimizer(recipe, parameters)
        optimizer = _call(path, lambda: module.optimizer(parameters))
        if not isinstance(optimizer, Optimizer):
            raise ExperimentError(f"{path}: optimizer(parameters) must return a torch optimizer, got {optimizer!r}")
        return optimizer

    train = with_noise(train, recipe, num_classes, seed)
    return Problem(train, test, num_classes, lambda: _call(path, module.model), criterion, make_optimizer)


def import_experiment(recipe: Recipe) -> Any:
    """Runs the recipe's experiment file, if it has one, and returns the module; None without.

    Raises:
        ExperimentError: If it cannot be run.
    """
    return None if recipe.experiment is None else _import(Path(recipe.experiment))


class _Loader(SourceFileLoader):
    """Runs a file as it was read, never a compiled form that lies beside it, which may be of other code."""

    def __init__(self, path: Path, source: bytes) -> None:
        super().__init__(path.stem, str(path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self.path)


_experiments: set[str] = set()  # modules that are experiment files, and may be loaded again


def _import(path: Path) -> Any:
    if not os.path.lexists(path):
        raise ExperimentError(f"{path}: no such experiment file")
    try:
        source = read_bytes(path, most=LARGEST_SETUP, follow=True)
    except DataError as error:
        raise ExperimentError(f"no such experiment file: {error}") from error
    if path.stem in sys.stdlib_module_names or path.stem in sys.modules.keys() - _experiments:
        raise ExperimentError(f"{path}: there is a module {path.stem} already; give the file another name")
    loader = _Loader(path, source)
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    if spec is None or path.suffix not in SOURCE_SUFFIXES:
        raise ExperimentError(f"{path}: an experiment file is a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    # Registered, and its folder on the path, as when it is run: its classes can be pickled and its neighbours imported.
    sys.modules[path.stem] = module
    _experiments.add(path.stem)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    _call(path, lambda: loader.exec_module(module))
    return module


def _call(path: Path, function: Callable[[], Any]) -> Any:
    """Calls into the user's file; what it raises becomes one line with the place in that file."""
    try:
        return function()
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path.name)]
        line = f":{frames[-1].lineno}" if frames else ""
        raise ExperimentError(f"{path}{line}: {type(error).__name__}: {error}") from error


def _count_classes(path: Path, model: Any, train: Any) -> int:
    if not isinstance(model, nn.Module):
        raise ExperimentError(f"{path}: model() must return a torch.nn.Module, got {type(model).__name__}")
    x, y = _first_pair(path, train)
    with torch.no_grad():
        logits = _call(path, lambda: model.eval()(x))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ExperimentError(f"{path}: the model must return logits of shape (batch, classes), got {got}")
    class_numbers(y, logits.shape[1])
    return logits.shape[1]


def _first_pair(path: Path, dataset: Any) -> tuple[Tensor, Tensor]:
    batch = _call(path, lambda: next(iter(DataLoader(dataset, batch_size=min(2, len(dataset))))))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise ExperimentError(f"{path}: a sample must be a pair (x, y) of a tensor and a class number")
    return batch[0], batch[1]
