"""What is trained and how, as plain values that go to disk and come back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from .._checks import Bounds, check_choice
from ..errors import InvalidArgumentError

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16", "float16")


LR, DECAY = Bounds(above=0, most=1e30), Bounds(least=0, most=1e8)  # a float32 must hold their product
SEED = Bounds(integer=True, least=0, most=2**32 - 1)  # scikit-learn and numpy take no larger ones


def _option(default: Any, text: str, bounds: Bounds | None = None) -> Any:
    """A field that the command makes an option of, with its help text and the bounds of a number."""
    said, _, else_ = text.partition("  [default")
    text = f"{said} ({bounds})" + (f"  [default{else_}" if else_ else "") if bounds else text
    return field(default=default, metadata={"help": text, "bounds": bounds})


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: everything that the methods of a comparison share.

    Args:
        experiment: Path of an experiment file: Python that defines ``model()``, ``train_set()`` and ``test_set()``, and
            if you like ``criterion()``, ``optimizer(parameters)`` and ``shift(x)``. It replaces ``data`` and ``model``.
        data: ``"digits"``, ``"mnist1d"``, ``"idx:FOLDER"`` (MNIST format, gzipped or not) or ``"folder:FOLDER"`` (one
            folder of images a class).
        model: ``"cnn"``, ``"cnn-gn"`` (with group norm, for ``private``), ``"cnn1d"`` (for mnist1d), ``"resnet18"``,
            ``"wrn-28-10"``, ``"pyramidnet-110"``, ``"timm/NAME"`` or ``"torchvision/NAME"``.
        epochs: Number of epochs.
        batch_size: Samples in a batch, all processes together.
        optimizer: The base optimizer, ``"sgd"`` or ``"adamw"``; its learning rate follows a cosine down to 0.
        lr: Learning rate at the start; None: 0.1 for sgd, 0.001 for adamw.
        momentum: Momentum of sgd; first beta of adamw.
        weight_decay: Weight decay; None: 0.0005 for sgd, 0.05 for adamw.
        crop: Crop training images at random, shifted by up to an eighth of their size.
        flip: Flip training images left to right at random.
        label_noise: Share of the training labels that are replaced by a wrong class.
        train_samples: Train on this many samples, drawn by the seed; 0: all.
        validation: Share of the training set to hold out and test on instead of the test set.
        image_size: Side in pixels to which the images of ``folder:`` are scaled and cropped.
        log_sharpness: Measure SAM's sharpness after every N-th epoch and the last; 0: never.
        log_curvature: Measure the Hessian's largest eigenvalue after every N-th epoch and the last; 0: never.
        fresh_statistics: Evaluate every network with batch-norm statistics made anew from training samples, as averages
            and the networks of methods that train at moved weights always are. Training does not feel it.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``; the last two by autocast.
        private: Train with differential privacy of this epsilon, by Opacus, which clips each sample's gradient and adds
            noise; batches are drawn by Poisson sampling. None: without.
        delta: Delta of that privacy.
        clip: Norm to which each sample's gradient is clipped for it.
        compile: Compile the network by ``torch.compile``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` and so on.
        workers: Processes that load data, for ``folder:`` and experiment files.

    Raises:
        InvalidArgumentError: (a ValueError) if a value is out of its bounds.

    Example:
        >>> from flatmin.lab import Recipe
        >>> Recipe(data="mnist1d", model="cnn1d", epochs=40).optimizer
        'sgd'
    """

    experiment: str | None = _option(None, "A Python file with model(), train_set() and test_set().")
    data: str = _option(
        "digits", "digits | mnist1d | idx:FOLDER (MNIST format, gzip or not) | folder:FOLDER (class folders)."
    )
    model: str = _option(
        "cnn",
        "cnn | cnn-gn (for --private) | cnn1d (for mnist1d) | resnet18 | wrn-28-10 | pyramidnet-110 | timm/NAME | "
        "torchvision/NAME.",
    )
    epochs: int = _option(60, "Epochs of training.", Bounds(integer=True, least=1))
    batch_size: int = _option(
        128,
        "Samples in a batch, all processes together; the last is dropped if a process would get fewer than two of it.",
        Bounds(integer=True, least=2, hint="; batch norm needs two samples"),
    )
    optimizer: str = _option("sgd", "sgd | adamw; the learning rate follows a cosine down to 0.")
    lr: float | None = _option(None, "Learning rate at the start.  [default: 0.1 for sgd, 0.001 for adamw]", LR)
    momentum: float = _option(0.9, "Momentum of sgd; first beta of adamw.", Bounds(least=0, below=1))
    weight_decay: float | None = _option(None, "Weight decay.  [default: 0.0005 for sgd, 0.05 for adamw]", DECAY)
    crop: bool = _option(False, "Crop training images at random, shifted by up to an eighth of their size.")
    flip: bool = _option(False, "Flip training images left to right at random.")
    label_noise: float = _option(
        0.0, "Share of the training labels that are replaced by a wrong class.", Bounds(least=0, below=1)
    )
    train_samples: int = _option(
        0, "Train on this many samples, drawn by the seed; 0: all.", Bounds(integer=True, least=0)
    )
    validation: float = _option(
        0.0,
        "Share of the training set to hold out and test on instead of the test set, to choose settings.",
        Bounds(least=0, below=1),
    )
    image_size: int = _option(
        32,
        "Side in pixels to which the images of folder: are scaled and cropped.",
        Bounds(integer=True, least=4, most=4096),
    )
    log_sharpness: int = _option(
        0,
        "Measure SAM's sharpness after every N-th epoch and the last: four passes over 512 samples; 0: never.",
        Bounds(integer=True, least=0),
    )
    log_curvature: int = _option(
        0,
        "Measure the Hessian's largest eigenvalue after every N-th epoch and the last: about forty passes over 512 "
        "samples; 0: never.",
        Bounds(integer=True, least=0),
    )
    fresh_statistics: bool = _option(
        False,
        "Evaluate every network with batch-norm statistics made anew from training samples, as ema, switch_ema, lawa, "
        "msam and s2sam always are.",
    )
    precision: str = _option(
        "float32", "float32 | bfloat16 | float16; the last two by autocast, float16 with a gradient scaler."
    )
    private: float | None = _option(
        None,
        "Train with differential privacy of this epsilon, by Opacus; base is then DP-SGD, and dpsat is there.  "
        "[default: without]",
        Bounds(above=0, most=1000),
    )
    delta: float = _option(1e-5, "With --private: delta.", Bounds(above=0, below=1))
    clip: float = _option(1.0, "With --private: norm to which each sample's gradient is clipped.", Bounds(above=0))
    compile: bool = _option(
        False, "Compile the network by torch.compile: minutes at the start of a run, and shorter steps on a GPU."
    )
    device: str = _option("auto", "auto | cpu | cuda | cuda:1 | mps.")
    workers: int = _option(
        0, "Processes that load data, for folder: and experiment files.", Bounds(integer=True, least=0, most=1024)
    )

    def __post_init__(self) -> None:
        if isinstance(self.experiment, PathLike):
            object.__setattr__(self, "experiment", fspath(self.experiment))
        if self.experiment is not None:
            _check_kind("experiment", self.experiment, str, "the path of a file")
        for name in ("data", "model", "optimizer", "precision", "device"):
            _check_kind(name, getattr(self, name), str, "a text")
        for name in ("crop", "flip", "fresh_statistics", "compile"):
            _check_kind(name, getattr(self, name), bool, "True or False")
        for name in ("data", "model"):
            if self.experiment is not None and getattr(self, name) != getattr(Recipe, name):
                raise InvalidArgumentError(
                    f"{name} and an experiment file exclude each other: the file defines its own"
                )
        for known in dataclasses.fields(self):
            value, bounds = getattr(self, known.name), known.metadata["bounds"]
            if bounds is not None and not (value is None and known.default is None):
                bounds.check(known.name, value)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.private is not None and self.precision == "float16":
            raise InvalidArgumentError("private and precision float16 exclude each other: take bfloat16 or float32")
        if self.private is not None and self.compile:
            raise InvalidArgumentError("private and compile exclude each other: Opacus looks into each layer's pass")


def _check_kind(name: str, value: Any, kind: type, said: str) -> None:
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{name} must be {said}, got {value!r:.80}")


@dataclass(frozen=True)
class Run:
    """One training run: a recipe, a method with its hyperparameters, and a seed.

    The seed draws the split (where the data set has none of its own), the initial weights, the order of the batches
    and the augmentation, so runs of different methods with the same seed differ in the method alone.

    Raises:
        InvalidArgumentError: If the seed is out of its bounds, or a hyperparameter is called as a part of the recipe.
    """

    recipe: Recipe
    method: str
    settings: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        SEED.check("seed", self.seed)
        taken = {"method", "seed", *(field.name for field in dataclasses.fields(Recipe))}
        for name in taken & set(self.settings):
            raise InvalidArgumentError(
                f"{self.method} has a hyperparameter {name!r}, and {name} is a part of every run; give it another name"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary that `from_json` takes."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "seed": self.seed,
            "recipe": dataclasses.asdict(self.recipe),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Run":
        """Takes what `to_json` returned; other keys are ignored."""
        return cls(Recipe(**values["recipe"]), values["method"], values["settings"], values["seed"])


def as_recipe(given: "Recipe | str | PathLike[str] | None") -> Recipe:
    """Returns a recipe as it is, an experiment file's with all defaults, or the default recipe for None.

    Raises:
        InvalidArgumentError: If it is something else.
    """
    if given is None or isinstance(given, Recipe):
        return given or Recipe()
    if not isinstance(given, (str, PathLike)):
        raise InvalidArgumentError(f"recipe must be a Recipe or the path of an experiment file, got {given!r:.80}")
    return Recipe(experiment=fspath(given))
