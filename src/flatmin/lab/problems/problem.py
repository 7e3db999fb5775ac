"""What is to be learnt, and what a loop needs of it: loaders, labels, the plain optimizer, seeds."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import Dataset, Subset, TensorDataset

from ...errors import DataError, InvalidArgumentError
from ..recipe import Recipe
from .data import add_label_noise, random_crop, random_flip

# What is held out, and what is left out, is drawn with the seed and these: streams of their own, or those held out
# would be the very ones that the seed has given wrong labels.
HOLD_OUT, LEAVE_OUT = 104_729, 1_299_709


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

    def sizes(self) -> dict[str, int]:
        """The numbers by which a data set that has changed can be told."""
        return {
            "training samples": len(self.train),  # type: ignore[arg-type]
            "test samples": len(self.test),  # type: ignore[arg-type]
            "classes": self.num_classes,
        }


def base_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Returns the plain optimizer that a recipe names."""
    if recipe.optimizer == "sgd":
        decay = 5e-4 if recipe.weight_decay is None else recipe.weight_decay
        return SGD(parameters, lr=recipe.lr or 0.1, momentum=recipe.momentum, weight_decay=decay)
    decay = 0.05 if recipe.weight_decay is None else recipe.weight_decay
    return AdamW(parameters, lr=recipe.lr or 1e-3, betas=(recipe.momentum, 0.999), weight_decay=decay)


def class_numbers(labels: Any, num_classes: int) -> Tensor:
    """Checks a batch of labels, on the CPU, before it goes to the device, and returns it as int64.

    Raises:
        DataError: If they are not class numbers from 0 to ``num_classes - 1``.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise DataError(
            f"labels must be class numbers, int64 of shape (batch,), got {got:.80}; for soft labels (mixup, cutmix) "
            "write your own loop, with flatmin.MESA and not SAF, whose outputs belong to another mixture"
        )
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise DataError(f"a label is outside the {num_classes} classes: {low if low < 0 else high}")
    return labels.long()


def check_size(name: str, train: Any) -> None:
    """Raises `DataError` where there is nothing to train on."""
    if len(train) < 2:
        raise DataError(f"{name} has {len(train)} training sample; there must be two at least")


def with_noise(train: "Dataset[Any]", recipe: Recipe, num_classes: int, seed: int) -> "Dataset[Any]":
    """Returns the training set with the recipe's share of wrong labels; the one given stays as it is."""
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
    train = copy.copy(train)  # the test set may be the same object, or this one be used again
    train.targets = noisy if isinstance(labels, Tensor) else noisy.tolist()  # type: ignore[attr-defined]
    return train


def reduced(problem: Problem, samples: int, seed: int) -> Problem:
    """Returns the problem with so many of its training samples.

    Raises:
        InvalidArgumentError: If there are fewer.
    """
    size = len(problem.train)  # type: ignore[arg-type]
    if samples > size:
        raise InvalidArgumentError(f"train_samples={samples} are more than there are, {size}; 0 takes all")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + LEAVE_OUT))
    train = _part(problem.train, order[:samples])
    check_size(f"train_samples={samples}", train)
    return replace(problem, train=train)


def held_out(problem: Problem, share: float, seed: int) -> Problem:
    """Returns the problem with a share of its training set, as it is, wrong labels and all, in place of the test set.

    Raises:
        InvalidArgumentError: If no sample would be held out.
    """
    size = len(problem.train)  # type: ignore[arg-type]
    held = round(share * size)
    if held < 1:
        raise InvalidArgumentError(f"validation={share} of {size} training samples is none; hold out a larger share")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + HOLD_OUT))
    train = _part(problem.train, order[held:])
    check_size(f"what validation={share} leaves", train)
    return replace(problem, train=train, test=_part(problem.train, order[:held]))


def _part(dataset: "Dataset[Any]", places: Tensor) -> "Dataset[Any]":
    if type(dataset) is TensorDataset:  # stays one: it is read by the batch
        return TensorDataset(*(tensor[places] for tensor in dataset.tensors))
    return Subset(dataset, places.tolist())


def augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Returns a batch of inputs, shifted and mirrored at random as the recipe says."""
    if recipe.crop:
        x = random_crop(x, max(x.shape[-1] // 8, 1), generator=generator)
    if recipe.flip:
        x = random_flip(x, generator=generator)
    return x


def make_criterion(problem: Problem, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the problem's criterion, or the cross entropy with label smoothing.

    Raises:
        InvalidArgumentError: If ``smoothing`` is out of its bounds, or not 0 where the problem has its own.
    """
    if problem.criterion is None:
        if not (math.isfinite(smoothing) and 0 <= smoothing < 1):
            raise InvalidArgumentError(f"smoothing must be in [0, 1), got {smoothing!r}")
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    if smoothing > 0:
        raise InvalidArgumentError(
            f"smoothing={smoothing} works on flatmin's own cross entropy, and the experiment file has a criterion(); "
            "leave the method smoothing out, or smooth there"
        )
    return problem.criterion
