"""What is to be learnt: data, network, criterion and base optimizer, from names or from an experiment file."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from .._checks import nearest
from ..data import Split, add_label_noise, load_digits, load_folder, load_idx
from ..errors import DataError, ExperimentError, InvalidArgumentError
from ..models import create_model
from .config import Recipe


@dataclass(frozen=True)
class Problem:
    """What is to be learnt.

    Attributes:
        train: Map-style data set of ``(x, y)``, ``y`` a class number.
        test: Likewise.
        num_classes: Number of classes.
        make_model: Returns a fresh network.
        criterion: Of ``(logits, y)``, a mean over the batch; None for the cross entropy.
        make_optimizer: Of the parameters.
    """

    train: "Dataset[Any]"
    test: "Dataset[Any]"
    num_classes: int
    make_model: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor] | None
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]


def load_problem(recipe: Recipe, seed: int) -> Problem:
    """Reads the data and finds the network that a recipe names.

    Args:
        recipe: The recipe.
        seed: Draws the split, where the data set has none of its own, and the label noise.

    Raises:
        FlatminError: If data, model or experiment file cannot be used.
    """
    if recipe.experiment is not None:
        return _from_experiment(Path(recipe.experiment), recipe, seed)
    split = _load_data(recipe, seed)
    channels = split.input_shape[0]
    train = _with_noise(split.train, recipe, split.num_classes, seed)
    return Problem(
        train,
        split.test,
        split.num_classes,
        lambda: create_model(recipe.model, channels, split.num_classes),
        None,
        lambda parameters: base_optimizer(recipe, parameters),
    )


def base_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Returns the plain optimizer that a recipe names."""
    if recipe.optimizer == "sgd":
        decay = 5e-4 if recipe.weight_decay is None else recipe.weight_decay
        return SGD(parameters, lr=recipe.lr or 0.1, momentum=recipe.momentum, weight_decay=decay)
    decay = 0.05 if recipe.weight_decay is None else recipe.weight_decay
    return AdamW(parameters, lr=recipe.lr or 1e-3, betas=(recipe.momentum, 0.999), weight_decay=decay)


def make_loader(
    dataset: "Dataset[Any]", batch_size: int, *, workers: int, generator: torch.Generator | None = None
) -> "DataLoader[Any]":
    """Returns a loader: shuffled by ``generator`` if there is one, in order otherwise."""
    size = len(dataset)  # type: ignore[arg-type]
    # Batch norm cannot train on a single sample, so a last batch of one is left out.
    drop_last = generator is not None and size % batch_size == 1
    if type(dataset) is TensorDataset:  # and none of its subclasses, which may do something for each sample
        # Tensors are indexed a batch at a time, some fifty times faster than sample by sample.
        order: Any = range(size) if generator is None else RandomSampler(dataset, generator=generator)
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last))
    return DataLoader(
        dataset,
        batch_size,
        shuffle=generator is not None,
        generator=generator,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _load_data(recipe: Recipe, seed: int) -> Split:
    kind, _, folder = recipe.data.partition(":")
    if recipe.data == "digits":
        return load_digits(seed)
    if kind == "idx" and folder:
        return load_idx(folder)
    if kind == "folder" and folder:
        return load_folder(folder, image_size=recipe.image_size, seed=seed)
    raise InvalidArgumentError(
        f"unknown data {recipe.data!r}{nearest(kind, ('digits', 'idx', 'folder'))}; "
        "there are digits, idx:FOLDER and folder:FOLDER, and experiment files for all else"
    )


def _with_noise(train: "Dataset[Any]", recipe: Recipe, num_classes: int, seed: int) -> "Dataset[Any]":
    if recipe.label_noise == 0:
        return train
    if type(train) is TensorDataset and len(train.tensors) == 2:
        inputs, targets = train.tensors
        return TensorDataset(inputs, add_label_noise(targets, recipe.label_noise, num_classes, seed=seed))
    labels = getattr(train, "targets", None)
    if not isinstance(labels, (Tensor, list)):
        raise InvalidArgumentError(
            f"label_noise={recipe.label_noise} needs a TensorDataset or a data set with .targets, "
            f"got {type(train).__name__}"
        )
    noisy = add_label_noise(torch.as_tensor(labels), recipe.label_noise, num_classes, seed=seed)
    train.targets = noisy if isinstance(labels, Tensor) else noisy.tolist()  # type: ignore[attr-defined]
    return train


def _from_experiment(path: Path, recipe: Recipe, seed: int) -> Problem:
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
    num_classes = _count_classes(path, _call(path, module.model), train)
    criterion = _call(path, module.criterion) if hasattr(module, "criterion") else None
    if criterion is not None and not callable(criterion):
        raise ExperimentError(f"{path}: criterion() must return a function of (logits, y), got {criterion!r}")

    def make_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        if not hasattr(module, "optimizer"):
            return base_optimizer(recipe, parameters)
        optimizer = _call(path, lambda: module.optimizer(parameters))
        if not isinstance(optimizer, Optimizer):
            raise ExperimentError(f"{path}: optimizer(parameters) must return a torch optimizer, got {optimizer!r}")
        return optimizer

    train = _with_noise(train, recipe, num_classes, seed)
    return Problem(train, test, num_classes, lambda: _call(path, module.model), criterion, make_optimizer)


_experiments: set[str] = set()  # modules that are experiment files, and may be loaded again


def _import(path: Path) -> Any:
    if not path.is_file():
        raise ExperimentError(f"{path}: no such experiment file")
    if path.stem in sys.stdlib_module_names or path.stem in sys.modules.keys() - _experiments:
        raise ExperimentError(f"{path}: there is a module {path.stem} already; give the file another name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ExperimentError(f"{path}: an experiment file is a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    # Registered, and its folder on the path, as when it is run: its classes can be pickled and its neighbours imported.
    sys.modules[path.stem] = module
    _experiments.add(path.stem)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    _call(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
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
    x, _ = _first_pair(path, train)
    with torch.no_grad():
        logits = _call(path, lambda: model.eval()(x))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ExperimentError(f"{path}: the model must return logits of shape (batch, classes), got {got}")
    return logits.shape[1]


def _first_pair(path: Path, dataset: Any) -> tuple[Tensor, Tensor]:
    batch = _call(path, lambda: next(iter(DataLoader(dataset, batch_size=min(2, len(dataset))))))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ExperimentError(f"{path}: a sample must be a pair (x, y)")
    return batch[0], batch[1]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Checks a batch of labels, on the CPU, before it goes to the device.

    Raises:
        DataError: If they are not class numbers from 0 to ``num_classes - 1``.
    """
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(
            f"labels must be class numbers, int64 of shape (batch,), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; for soft labels (mixup, cutmix) write your own loop, with flatmin.MESA and not "
            "SAF, whose remembered outputs belong to another mixture"
        )
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise DataError(f"a label is outside the {num_classes} classes: {low if low < 0 else high}")
