"""The IDX files of MNIST and the data sets that took over its layout, Fashion-MNIST and others.

An IDX file is two zero bytes, a byte for the element type, a byte for the number of dimensions, each
dimension as four bytes (big-endian), and the elements.
"""

import gzip
import math
import os
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...._files import open_file
from ....errors import DataError
from ._split import Split, tensor_split

_UBYTE = 0x08
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20  # bytes; read() allocates all it is asked for, so it is never asked for what a header says
# What a gzipped file may unfold to, in bytes, and in multiples of its own size: MNIST's images unfold to five times it.
_UNFOLDED, _RATIO = 1 << 28, 100


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    Args:
        path: The file. Its first bytes tell whether it is gzipped; its name does not matter.

    Returns:
        A uint8 tensor of the shape in the file's header.

    Raises:
        DataError: If the file is missing, empty, cut short, too long or corrupt, or holds another type, or is gzipped
            and unfolds to more than 256 MiB and a hundred times its size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.idx1-ubyte")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     read_idx(path)
        tensor([7, 8, 9], dtype=torch.uint8)

    LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits, 1998.
    """
    path = Path(path)
    try:
        with open_file(path, follow=True) as file:
            packed, size = file.read(2) == _GZIP, os.fstat(file.fileno()).st_size
            file.seek(0)
            if packed:
                return _parse(gzip.GzipFile(fileobj=file), max(_UNFOLDED, _RATIO * size))
            return _parse(file, size)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; it must be a whole IDX file of unsigned bytes, gzipped or not"
        ) from error


def load_idx(folder: str | os.PathLike[str]) -> Split:
    """Loads a folder in the layout of MNIST: images and labels to train on and to test on, four IDX files.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each gzipped (``.gz``) or not; ``train-images.idx3-ubyte`` is known too.

    Args:
        folder: Where the four files are.

    Returns:
        The split: `TensorDataset`s of float32 images (N, 1, H, W), standardised by the training set's mean
        and standard deviation, and int64 labels (N,). The largest training label gives the number of classes.

    Raises:
        DataError: If the folder or a file is missing or damaged, or if the files do not fit one another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give the one that holds train-images-idx3-ubyte and the others")
    train_images, train_labels = _read_part(folder, "train")
    test_images, test_labels = _read_part(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{folder} has training images of {_times(train_images.shape[1:])} pixels and test images of "
            f"{_times(test_images.shape[1:])}; take both from one data set"
        )
    unknown = test_labels[~torch.isin(test_labels, train_labels)]
    if len(unknown):
        raise DataError(
            f"{folder} has test labels {sorted(set(unknown.tolist()))} that no training image has; "
            "take both sets from one data set"
        )
    num_classes = int(train_labels.max()) + 1
    if num_classes < 2:
        raise DataError(f"{folder} has the training label 0 alone; a classifier needs two classes or more")
    return tensor_split(
        (train_images.unsqueeze(1) / 255, train_labels),
        (test_images.unsqueeze(1) / 255, test_labels),
        classes=tuple(str(label) for label in range(num_classes)),
    )


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Returns the images (N, H, W) and labels (N,) of ``train`` or ``t10k``."""
    images_path, labels_path = _find(folder, f"{part}-images", 3), _find(folder, f"{part}-labels", 1)
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, tensor, dimensions in ((images_path, images, 3), (labels_path, labels, 1)):
        if tensor.ndim != dimensions:
            raise DataError(
                f"{path} holds {_times(tensor.shape)} bytes, a shape of {tensor.ndim} dimensions; "
                f"{dimensions} are needed: is another file under this name?"
            )
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels; "
            "take both from one data set"
        )
    return images, labels


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has none of {', '.join(names)}; put the file there or give another folder")


def _parse(stream: BufferedIOBase | BinaryIO, most: int) -> Tensor:
    """Reads what the header says there is, but never more than ``most`` bytes and one."""
    magic = _read(stream, 4)
    if not magic:
        raise ValueError("the file is empty")
    if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 8:
        raise ValueError(f"it begins with the bytes {magic.hex(' ')}, not with those of an IDX file")
    if magic[2] != _UBYTE:
        raise ValueError(f"its elements are of type 0x{magic[2]:02x}, not unsigned bytes (0x{_UBYTE:02x})")

    header = _read(stream, 4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError("it ends within the header")
    shape = struct.unpack(f">{magic[3]}I", header)
    size = math.prod(shape)
    if size == 0:
        raise ValueError(f"it holds no samples: its header says {_times(shape)} bytes")

    content = _read(stream, min(size, most + 1))
    if len(content) > most:
        raise ValueError(f"it unfolds to more than {most} bytes; if that is right, unpack it with gunzip")
    if len(content) < size:
        raise ValueError(f"it is cut short: its header says {_times(shape)} bytes, it has {len(content)}")
    if stream.read(1):
        raise ValueError(f"it is too long: more follows the {_times(shape)} bytes that its header says")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _read(stream: BufferedIOBase | BinaryIO, size: int) -> bytearray:
    """Returns the next ``size`` bytes or, if the stream ends before, those that are left."""
    content = bytearray()
    while len(content) < size and (chunk := stream.read(min(size - len(content), _CHUNK))):
        content += chunk
    return content


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
