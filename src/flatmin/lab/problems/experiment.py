"""Experiment files: Python files that define a network and its data sets."""

import importlib.util
import inspect
import os
import symtable
import sys
from collections.abc import Iterable
from importlib.machinery import SOURCE_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ..._files import LARGEST_SETUP, read_bytes
from ..._rng import CPU, preserved, seed_all
from ...errors import DataError, ExperimentError
from ..recipe import Recipe
from .problem import Problem, base_optimizer, check_size, class_numbers, with_noise
from .source import FILE, NETWORK, TEST, TRAIN, SampleLists, Samples, Source, aside

NEEDED = ("model", "train_set", "test_set")  # what an experiment file defines
HOOKS = ("criterion", "optimizer", "shift")  # and what it may


def from_experiment(path: Path, recipe: Recipe, seed: int) -> Problem:
    """Runs the file and makes the problem that it defines.

    Raises:
        ExperimentError: If it cannot be used; the message names the file, the line where it has raised and the function
            that is wrong.
    """
    source = Source(path)
    seed_all(seed)  # before anything of the file runs: a split it draws must be that of all methods with this seed
    module = _import(path)
    for name in NEEDED:
        if not callable(getattr(module, name, None)):
            source.refuse(
                f"there is no function {name}(); an experiment file defines model(), train_set() and "
                "test_set(), and if it likes criterion(), optimizer(parameters) and shift(x)"
            )
    train, test = (source.call(f"{name}()", getattr(module, name)) for name in ("train_set", "test_set"))
    lengths = [_length(source, part, dataset) for part, dataset in ((TRAIN, train), (TEST, test))]
    check_size(f"{path}: train_set()", range(lengths[0]))
    model = source.call("model()", module.model)
    num_classes = _count_classes(source, model, train, lengths[0])
    with preserved(CPU):
        _look_ahead(source, model, train, test, lengths, num_classes)
    criterion = source.call("criterion()", module.criterion) if hasattr(module, "criterion") else None
    if criterion is not None and not callable(criterion):
        source.refuse(f"criterion() must return a function of (logits, y), got {criterion!r:.100}")
    if hasattr(module, "optimizer"):
        for name in ("optimizer", "lr", "momentum", "weight_decay"):
            if getattr(recipe, name) != getattr(Recipe, name):
                raise ExperimentError(f"{path} has its own optimizer(), so {name} is set there and not as an option")

    def make_model() -> nn.Module:
        return _network(source, source.call("model()", module.model))

    def make_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        if not hasattr(module, "optimizer"):
            return base_optimizer(recipe, parameters)
        given = list(parameters)
        return _optimizer(source, source.call("optimizer(parameters)", lambda: module.optimizer(iter(given))), given)

    noisy = source.call(TRAIN, lambda: with_noise(train, recipe, num_classes, seed))
    # Tensors are read by the batch, and cannot raise.
    train, test = (
        dataset if type(dataset) is TensorDataset else _through(dataset, source, part, length)
        for dataset, part, length in zip((noisy, test), (TRAIN, TEST), lengths, strict=True)
    )
    shift = getattr(module, "shift", None)
    return Problem(train, test, num_classes, make_model, criterion, make_optimizer, source, shift)


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
    try:
        there = os.path.lexists(path)
    except ValueError as error:  # no name of a file
        raise ExperimentError(f"{path!s:.100}: no such experiment file ({error})") from error
    if not there:
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
    Source(path).call(FILE, lambda: loader.exec_module(module))
    for name in imported_hooks(source, module):
        Source(path).refuse(
            f"{name} is imported, and might be meant for something else: to have it as the experiment file's {name}(), "
            f"define it here (def {name}, or {name} = module.{name}), else import it under another name (import ... as)"
        )
    return module


def imported_hooks(source: bytes, module: Any) -> list[str]:
    """Those of `HOOKS` that a file only imports, so that nothing says whether it means them, as it does what is needed.

    Args:
        source: The file.
        module: What it has become.
    """
    table = symtable.symtable(importlib.util.decode_source(source), module.__name__, "exec")
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
    imported = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_imported()}

    def is_foreign(name: str) -> bool:  # what a star import has brought is in no table
        return name in imported or getattr(vars(module)[name], "__module__", module.__name__) != module.__name__

    return [name for name in HOOKS if name in vars(module) and name not in own and is_foreign(name)]


def _length(source: Source, part: str, dataset: Any) -> int:
    """Checks what train_set() or test_set() has returned, and returns its length."""
    name = part.removeprefix("the data set of ")
    iterable = isinstance(dataset, IterableDataset)
    if iterable or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        source.refuse(
            f"{name} must return a map-style data set (with __getitem__ and __len__), got {type(dataset).__name__}"
        )
    length = source.call(part, lambda: len(dataset))
    if length == 0:
        source.refuse(f"{name} returned an empty data set")
    return length


def _network(source: Source, model: Any) -> nn.Module:
    """Checks what model() has returned."""
    if not isinstance(model, nn.Module):
        source.refuse(f"model() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_trainable(source: Source, model: nn.Module) -> None:
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        has = "whose parameters are all frozen (requires_grad=False)" if parameters else "without parameters"
        source.refuse(f"model() returned a network {has}, so there is nothing to train")


def _count_classes(source: Source, model: Any, train: Any, length: int) -> int:
    x, y = _pair(source, TRAIN, train, [0, min(1, length - 1)])
    logits = _logits(source, _network(source, model).eval(), x)
    _check_trainable(source, model)
    class_numbers(y, logits.shape[1], source.prefixed(TRAIN))
    return logits.shape[1]


def _look_ahead(source: Source, model: nn.Module, train: Any, test: Any, lengths: list[int], num_classes: int) -> None:
    """Looks at what else would show only when an epoch is spent: the test set, and the ends of both.

    Nothing of the run is changed by it: see `aside`.
    """
    x, _ = _pair(source, TRAIN, aside(train), [lengths[0] - 1])
    test_x, _ = _pair(source, TEST, aside(test), [0, lengths[1] - 1])
    try:
        found = _logits(source, model, test_x).shape[1]
    except ExperimentError as error:
        if test_x.shape[1:] == x.shape[1:]:
            raise
        shapes = f"test_set() has samples of shape {tuple(test_x.shape[1:])}, train_set() of {tuple(x.shape[1:])}"
        raise ExperimentError(f"{error}; {shapes}") from error.__cause__
    if found != num_classes:
        source.refuse(
            f"the network of model() has {num_classes} logits for a sample of train_set() and {found} for one of "
            "test_set(): samples of both must have one shape"
        )
    for part, dataset in ((TRAIN, train), (TEST, test)):
        if type(dataset) is TensorDataset:  # all labels are at hand
            class_numbers(dataset.tensors[1], num_classes, source.prefixed(part))


def _logits(source: Source, model: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits: Any = source.call(NETWORK, lambda: model(x))
    except ExperimentError as error:
        own = next((each.dtype for each in model.parameters() if each.is_floating_point()), x.dtype)
        if x.dtype == own or "type" not in str(error):  # torch says that two types must be the same, in many words
            raise
        said = f"the inputs are {x.dtype}, the weights {own}; return x.to({own})"
        raise ExperimentError(f"{error}; {said}") from error.__cause__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        source.refuse(f"the network of model() must return logits of shape (batch, classes), got {got}")
    return logits


def _pair(source: Source, part: str, dataset: Any, indices: list[int]) -> tuple[Tensor, Any]:
    """A batch of these samples."""
    chosen = _through(dataset, source, part, len(indices))
    batch = source.call(part, lambda: next(iter(DataLoader(chosen, batch_size=len(indices), sampler=indices))))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        source.refuse(f"a sample must be a pair (x, y) of a tensor and a class number; {part} has others")
    return batch[0], batch[1]


def _through(dataset: Any, source: Source, part: str, length: int) -> Samples:
    """The data set, read through `Source.calling`."""
    kind = SampleLists if hasattr(dataset, "__getitems__") else Samples
    return kind(dataset, source, part, length)


def _optimizer(source: Source, optimizer: Any, given: list[nn.Parameter]) -> Optimizer:
    """Checks what optimizer(parameters) has returned."""
    if not isinstance(optimizer, Optimizer):
        source.refuse(f"optimizer(parameters) must return a torch optimizer, got {optimizer!r:.100}")
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        source.refuse(
            f"optimizer(parameters) returned {name}, which calls the closure as often as it likes in a step; return "
            "one whose step needs none, such as SGD or AdamW"
        )
    own = {id(parameter) for parameter in given}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in held if id(parameter) not in own]
    if not any(id(parameter) in own and parameter.requires_grad for parameter in held):
        source.refuse(
            f"optimizer(parameters) returned {name} with none of the network's weights, so nothing would be trained; "
            "give it the parameters that it was called with"
        )
    if foreign:
        source.refuse(
            f"optimizer(parameters) returned {name} with {len(foreign)} of its tensors none of the network's, which no "
            "checkpoint would keep; give it the parameters that it was called with, or some of them"
        )
    return optimizer
