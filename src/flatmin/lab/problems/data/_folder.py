"""Images in folders, one folder for each class."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...._checks import check_integer
from ...._files import open_file
from ....errors import DataError, InvalidArgumentError, require
from ._split import Split, stratified_halves

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MOST_PIXELS = 1 << 26  # of an image: 64 Mi, which decoded take 256 MB
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green and blue in [0, 1]

_Classes: TypeAlias = tuple[str, ...]
_Images: TypeAlias = tuple[list[Path], Tensor]  # files and their labels


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Image files and their labels; an image is read each time it is asked for.

    An image is converted to RGB, its largest centred square is scaled to ``image_size`` (bilinear,
    antialiased), and each channel is normalised by ImageNet's mean and standard deviation.

    Args:
        paths: The image files.
        targets: Their labels, int64 of shape (N,). Kept as the attribute ``targets``, which may be replaced.
        image_size: Height and width of an item in pixels.

    Raises:
        InvalidArgumentError: If ``targets`` do not fit ``paths`` or ``image_size`` is not at least 1.
        MissingDependencyError: On access, if Pillow is not installed.
        DataError: On access, if a file is no image, is damaged, has more than 8 bits per channel or more than 2**26
            pixels (8192 x 8192).
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], targets: Tensor, *, image_size: int = 32) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.targets = targets
        self.image_size = check_integer("image_size", image_size, least=1)
        if targets.shape != (len(paths),) or targets.dtype != torch.int64:
            raise InvalidArgumentError(
                f"targets must be int64 of shape ({len(paths)},), one for each path, "
                f"got {targets.dtype} of shape {tuple(targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the image, float32 of shape (3, image_size, image_size), and its label."""
        return _read_image(self.paths[index], self.image_size), int(self.targets[index])


def load_folder(folder: str | os.PathLike[str], *, image_size: int = 32, seed: int = 0) -> Split:
    """Loads images in class folders.

    If ``folder`` has ``train/`` and ``test/`` (or else ``val/``), these are the two sets, each with its class
    folders; ``train/`` decides the classes. Otherwise ``folder`` itself has the class folders, and half of
    each class, drawn from ``seed``, is the training set. Class folders are searched to any depth; hidden files
    are ignored.

    Args:
        folder: The folder.
        image_size: Height and width that images are brought to, in pixels; see `ImageFolder`.
        seed: Seed of the halves, at least 0; unused where the folder has a test set.

    Returns:
        The split, of two `ImageFolder` sets. Classes are in the order of their names.

    Raises:
        InvalidArgumentError: If ``image_size`` or ``seed`` is outside its range.
        DataError: If the folder is missing or has fewer than two class folders, if a class has no images
            (or one alone, to be halved), or if the test set has a class that the training set lacks.
    """
    check_integer("image_size", image_size, least=1)
    check_integer("seed", seed, least=0)
    folder = Path(folder)
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if train.is_dir() and test is not None:
        classes, train_set, test_set = _given_sets(train, test)
    elif train.is_dir() and _subfolders(train):
        raise DataError(f"{folder} has train/ with class folders but neither test/ nor val/; add one")
    else:
        classes, train_set, test_set = _halved_sets(folder, seed)
    if len(classes) < 2:
        raise DataError(f"{folder} has the class {classes[0]} alone; a classifier needs two classes or more")
    return Split(
        train=ImageFolder(*train_set, image_size=image_size),
        test=ImageFolder(*test_set, image_size=image_size),
        num_classes=len(classes),
        input_shape=(3, image_size, image_size),
        classes=classes,
    )


def _given_sets(train: Path, test: Path) -> tuple[_Classes, _Images, _Images]:
    train_images, test_images = _images_by_class(train), _images_by_class(test)
    unknown = [name for name in test_images if name not in train_images]
    if unknown:
        raise DataError(f"{test} has class folders that {train} lacks: {', '.join(unknown)}; remove or rename them")
    classes = tuple(train_images)
    return classes, _flatten(train_images, classes), _flatten(test_images, classes)


def _halved_sets(folder: Path, seed: int) -> tuple[_Classes, _Images, _Images]:
    images = _images_by_class(folder)
    for name, paths in images.items():
        if len(paths) < 2:
            raise DataError(f"{folder / name} has one image alone; a class needs two or more")
    classes = tuple(images)
    paths, targets = _flatten(images, classes)
    train, test = stratified_halves(targets, seed=seed)
    return (
        classes,
        ([paths[i] for i in train.tolist()], targets[train]),
        ([paths[i] for i in test.tolist()], targets[test]),
    )


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Returns the sorted images of each class folder, in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give one that has a folder of images for each class")
    images = {subfolder.name: _images(subfolder) for subfolder in _subfolders(folder)}
    if not images:
        raise DataError(f"{folder} has no class folders; put the images of each class into its own folder")
    for name, paths in images.items():
        if not paths:
            raise DataError(f"{folder / name} has no {', '.join(sorted(_SUFFIXES))}; add images or remove it")
    return images


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _flatten(images: dict[str, list[Path]], classes: _Classes) -> _Images:
    label = {name: index for index, name in enumerate(classes)}
    labels = [label[name] for name, paths in images.items() for _ in paths]
    return [path for paths in images.values() for path in paths], torch.tensor(labels)


def _read_image(path: Path, size: int) -> Tensor:
    pillow = require("PIL.Image", install="flatmin[cli]")
    try:
        with open_file(path, follow=True) as file, pillow.open(file) as image:  # which reads the header alone
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {_MOST_PIXELS}; scale it down")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode} do not fit into 8 bits per channel")
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            square = image.convert("RGB").resize(
                (size, size), pillow.Resampling.BILINEAR, box=(left, top, left + side, top + side)
            )
    except Exception as error:  # Pillow's decoders raise all kinds on a damaged file
        raise DataError(f"cannot read the image {path}: {error}; replace or remove the file") from error
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    return (pixels.view(size, size, 3).permute(2, 0, 1).contiguous() / 255 - mean) / std
