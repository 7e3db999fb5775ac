"""A problem, as a recipe names it."""

from pathlib import Path

from ..._checks import nearest
from ...errors import DataError, FlatminError, InvalidArgumentError, require
from ..recipe import Recipe
from .data import Split, load_digits, load_folder, load_idx, load_mnist1d
from .experiment import from_experiment
from .experiment import import_experiment as import_experiment
from .models import create_model, input_dimensions
from .problem import Problem, base_optimizer, check_size, held_out, reduced, with_noise
from .source import Source


def load_problem(recipe: Recipe, seed: int) -> Problem:
    """Reads the data and finds the network that a recipe names.

    Args:
        recipe: The recipe.
        seed: Draws the split, where the data set has none of its own, and the label noise.

    Raises:
        FlatminError: If data, model or experiment file cannot be used.
    """
    require("numpy", install="flatmin[cli]")  # seed_all reaches it only once it is imported
    if recipe.experiment is not None:
        problem = from_experiment(Path(recipe.experiment), recipe, seed)
    else:
        problem = _from_names(recipe, seed)
    if recipe.train_samples > 0:
        problem = reduced(problem, recipe.train_samples, seed)
    return problem if recipe.validation == 0 else held_out(problem, recipe.validation, seed)


def _from_names(recipe: Recipe, seed: int) -> Problem:
    try:
        split = _load_data(recipe, seed)
    except (OSError, ValueError) as error:
        if isinstance(error, FlatminError):
            raise
        raise DataError(f"data {recipe.data!r:.100} cannot be read: {error}") from error
    _check_fit(recipe, split.input_shape)
    check_size(recipe.data, split.train)
    channels = split.input_shape[0]
    train = with_noise(split.train, recipe, split.num_classes, seed)
    return Problem(
        train,
        split.test,
        split.num_classes,
        lambda: create_model(recipe.model, channels, split.num_classes),
        None,
        lambda parameters: base_optimizer(recipe, parameters),
        Source(name=f"model {recipe.model!r} on inputs of shape {split.input_shape} ({recipe.data!r})"),
    )


def _load_data(recipe: Recipe, seed: int) -> Split:
    kind, _, folder = recipe.data.partition(":")
    if recipe.data == "digits":
        return load_digits(seed)
    if recipe.data == "mnist1d":
        return load_mnist1d()
    if kind == "idx" and folder:
        return load_idx(folder)
    if kind == "folder" and folder:
        return load_folder(folder, image_size=recipe.image_size, seed=seed)
    raise InvalidArgumentError(
        f"unknown data {recipe.data!r}{nearest(kind, ('digits', 'mnist1d', 'idx', 'folder'))}; "
        "there are digits, mnist1d, idx:FOLDER and folder:FOLDER, and experiment files for all else"
    )


def _check_fit(recipe: Recipe, shape: tuple[int, ...]) -> None:
    """Raises unless the network and the augmentation are for inputs of this shape, channels first."""
    kinds = {1: "signals", 2: "images"}
    has, wants = len(shape) - 1, input_dimensions(recipe.model)
    if has != wants:
        raise InvalidArgumentError(
            f"model {recipe.model!r} takes {kinds[wants]}, and the data {recipe.data!r} are {kinds[has]} of shape "
            f"{shape}; take model {'cnn1d' if has == 1 else 'cnn'}"
        )
    for name in ("crop", "flip"):
        if has == 1 and getattr(recipe, name):
            raise InvalidArgumentError(
                f"{name} is for images, and the data {recipe.data!r} are signals of shape {shape}; leave it out"
            )
