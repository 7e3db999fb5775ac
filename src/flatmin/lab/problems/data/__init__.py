"""Plain datasets: each loader gives a `Split`, and nothing is downloaded."""

from ....indices import with_indices as with_indices
from ._augment import random_crop as random_crop
from ._augment import random_flip as random_flip
from ._digits import load_digits as load_digits
from ._folder import ImageFolder as ImageFolder
from ._folder import load_folder as load_folder
from ._idx import load_idx as load_idx
from ._idx import read_idx as read_idx
from ._mnist1d import load_mnist1d as load_mnist1d
from ._noise import add_label_noise as add_label_noise
from ._split import Split as Split

__all__ = [
    "ImageFolder",
    "Split",
    "add_label_noise",
    "load_digits",
    "load_folder",
    "load_idx",
    "load_mnist1d",
    "random_crop",
    "random_flip",
    "read_idx",
    "with_indices",
]
