"""Augmentation of a whole batch at once, on the device where the batch is.

Randomness comes from the generator alone and is drawn on the generator's device: a CPU generator gives the
same crops and flips whether the images are on the CPU or on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._checks import check_integer
from ....errors import InvalidArgumentError


def random_crop(images: Tensor, padding: int, *, generator: torch.Generator) -> Tensor:
    """Pads each image with zeros and cuts out a window of its old size at a random place.

    Args:
        images: A batch of shape (B, C, H, W).
        padding: Pixels added on each side, at least 0. Each image is shifted on its own, by up to this
            many pixels in each direction.
        generator: Draws the places.

    Returns:
        A new batch of the same shape, dtype and device.

    Raises:
        InvalidArgumentError: If ``images`` is not of four dimensions or ``padding`` no integer of at least 0.

    Example:
        >>> batch = random_crop(torch.ones(8, 3, 32, 32), 4, generator=torch.Generator().manual_seed(0))
        >>> batch.shape, bool((batch == 0).any())
        (torch.Size([8, 3, 32, 32]), True)
    """
    _check_images(images)
    check_integer("padding", padding, least=0)
    batch, channels, height, width = images.shape
    places = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator, device=generator.device)
    top, left = to_device(places, images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    padded = F.pad(images, (padding,) * 4)
    return padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirrors each image left to right with probability one half.

    Args:
        images: A batch of shape (B, C, H, W).
        generator: Draws which images are mirrored.

    Returns:
        A new batch of the same shape, dtype and device.

    Raises:
        InvalidArgumentError: If ``images`` is not of four dimensions.

    Example:
        >>> batch = torch.tensor([0.0, 1.0]).expand(4, 1, 1, 2)
        >>> random_flip(batch, generator=torch.Generator().manual_seed(0))[:, 0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    """
    _check_images(images)
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(to_device(flipped, images.device), images.flip(-1), images)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a small tensor to a device; the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise InvalidArgumentError(f"images must be of shape (B, C, H, W), got {tuple(images.shape)}")
