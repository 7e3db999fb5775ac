"""A problem: the data, the network, the criterion and the plain optimizer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import Dataset, Subset, TensorDataset

from ..._checks import check_number
from ...errors import DataError, InvalidArgumentError
from ..recipe import Recipe
from .batches import size_of
from .data import add_label_noise, random_crop, random_flip
from .source import Source

# Added to the seed to draw which samples are held out or left out: with the seed alone, those held out would be the
# very samples whose labels the seed has made wrong.
HOLD_OUT, LEAVE_OUT = 104_729, 1_299_709
FUSED = {"cuda"}  # types of devices on which a step is made by one kernel


@dataclass(frozen=True)
class Problem:
    """The data, the network, the criterion and the plain optimizer.

    Attributes:
        train: Training set, map-style, of ``(x, y)`` with a class index ``y``.
        test: Test set of the same form.
        num_classes: Number of classes.
        make_model: Returns a new network.
        criterion: Maps ``(logits, y)`` to the mean loss of a batch; None for the cross entropy.
        make_optimizer: Maps the parameters to the plain optimizer.
        source: Where they come from, through which all of them are called.
        shift: Makes of a batch of inputs those of a shifted set, on which a finished network is fine-tuned; None: their
            sign is changed.
    """

    train: "Dataset[Any]"
    test: "Dataset[Any]"
    num_classes: int
    make_model: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor] | None
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    source: Source = field(default_factory=Source)
    shift: Callable[[Tensor], Tensor] | None = None

    def sizes(self) -> dict[str, int]:
        """The sizes by which a changed data set is noticed."""
        return {
            "training samples": size_of(self.train),
            "test samples": size_of(self.test),
            "classes": self.num_classes,
        }


def base_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Returns the plain optimizer that a recipe names.

    On a GPU it is fused: one kernel makes the step, and leaves it out where flatmin's optimizers say so, which copy all
    weights in each step otherwise. Not in float16: torch's fused SGD begins with any momentum after a first step that
    overflows.
    """
    parameters = list(parameters)
    can = all(each.device.type in FUSED and each.is_floating_point() for each in parameters)
    fused = True if can and recipe.precision != "float16" else None
    if recipe.optimizer == "sgd":
        decay = 5e-4 if recipe.weight_decay is None else recipe.weight_decay
        return SGD(parameters, lr=recipe.lr or 0.1, momentum=recipe.momentum, weight_decay=decay, fused=fused)
    decay = 0.05 if recipe.weight_decay is None else recipe.weight_decay
    return AdamW(parameters, lr=recipe.lr or 1e-3, betas=(recipe.momentum, 0.999), weight_decay=decay, fused=fused)


def class_numbers(labels: Any, num_classes: int, prefix: str = "") -> Tensor:
    """Checks a batch of labels on the CPU, before it goes to the device, and returns it as int64.

    ``prefix`` begins the error, and says where they come from.

    Raises:
        DataError: If they are not class indices from 0 to ``num_classes - 1``.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        way = (
            "for soft labels (mixup, cutmix) write your own loop, with flatmin.MESA: SAF compares with another mixture"
        )
        if isinstance(labels, Tensor) and labels.ndim == 1:
            way = "if they are class indices as floats, return y.long()"
        elif isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == 1:
            way = "return y[:, 0].long()"
        raise DataError(f"{prefix}labels must be class indices, int64 of shape (batch,), got {got:.80}; {way}")
    low, high = (int(bound) for bound in labels.aminmax()) if len(labels) else (0, 0)
    if low < 0 or high >= num_classes:
        raise DataError(f"{prefix}a label is outside the {num_classes} classes: {low if low < 0 else high}")
    return labels.long()


def check_size(name: str, train: Any) -> None:
    """Raises `DataError` where there is nothing to train on."""
    if len(train) < 2:
        raise DataError(f"{name} has {len(train)} training sample; at least two are needed")


def with_noise(train: "Dataset[Any]", recipe: Recipe, num_classes: int, seed: int) -> "Dataset[Any]":
    """Returns a training set with the recipe's share of wrong labels; the given one is not changed."""
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
    copied: Any = copy.copy(train)  # the test set may be the same object, or this one be used again
    copied.targets = noisy if isinstance(labels, Tensor) else noisy.tolist()
    made: Dataset[Any] = copied
    return made


def reduced(problem: Problem, samples: int, seed: int) -> Problem:
    """Returns the problem with a part of its training samples, drawn by the seed.

    Raises:
        InvalidArgumentError: If there are fewer.
    """
    size = size_of(problem.train)
    if samples > size:
        raise InvalidArgumentError(f"train_samples={samples} is more than the {size} training samples; 0 takes all")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + LEAVE_OUT))
    train = _part(problem.train, order[:samples])
    check_size(f"train_samples={samples}", train)
    return replace(problem, train=train)


def held_out(problem: Problem, share: float, seed: int) -> Problem:
    """Returns the problem with a held-out share of its training set, wrong labels included, in place of the test set.

    Raises:
        InvalidArgumentError: If no sample would be held out.
    """
    size = size_of(problem.train)
    held = round(share * size)
    if held < 1:
        raise InvalidArgumentError(
            f"validation={share} of {size} training samples is no sample; hold out a larger share"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + HOLD_OUT))
    train = _part(problem.train, order[held:])
    check_size(f"what validation={share} leaves", train)
    return replace(problem, train=train, test=_part(problem.train, order[:held]))


def _part(dataset: "Dataset[Any]", chosen: Tensor) -> "Dataset[Any]":
    if type(dataset) is TensorDataset:  # stays one: it is read by the batch
        return TensorDataset(*(tensor[chosen] for tensor in dataset.tensors))
    return Subset(dataset, chosen.tolist())


def augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Returns a batch of inputs, randomly cropped and flipped as the recipe says."""
    if recipe.crop:
        x = random_crop(x, max(x.shape[-1] // 8, 1), generator=generator)
    if recipe.flip:
        x = random_flip(x, generator=generator)
    return x


def make_criterion(problem: Problem, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the problem's criterion, or the cross entropy with label smoothing.

    Raises:
        InvalidArgumentError: If ``smoothing`` is out of its bounds, or not 0 with a criterion of the problem's own.
    """
    if problem.criterion is None:
        check_number("smoothing", smoothing, least=0, below=1)
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    if smoothing > 0:
        raise InvalidArgumentError(
            f"smoothing={smoothing} needs flatmin's own cross entropy, but the experiment file has a criterion(): "
            "leave out the method smoothing, or smooth the labels there"
        )
    return problem.criterion
