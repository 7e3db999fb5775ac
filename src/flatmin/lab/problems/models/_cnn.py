"""A small convolutional network, for digits, tests and examples."""

from torch import nn

from ...._checks import check_integer
from ._layers import check_sizes, conv3x3, head, init_convolutions


class SmallCNN(nn.Sequential):
    """Three 3x3 convolutions with batch or group normalization, the average over the image and a linear layer.

    Takes images of shape ``(batch, in_channels, height, width)``, 4x4 or larger, and returns logits of shape
    ``(batch, num_classes)``.

    Args:
        in_channels: Channels of the images, such as 1 for gray and 3 for color.
        num_classes: Number of logits.
        width: Channels after the first convolution; the next two double them.
        groups: Groups of a group normalization, of which ``width`` is a multiple. None: batch normalization.

    Raises:
        InvalidArgumentError: If one of them is not an integer of at least 1.

    Example:
        >>> import torch
        >>> SmallCNN(1, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int, *, width: int = 16, groups: int | None = None) -> None:
        check_sizes(in_channels, num_classes)
        check_integer("width", width, least=1)
        super().__init__(
            *_conv_norm_relu(in_channels, width, groups),
            *_conv_norm_relu(width, 2 * width, groups),
            nn.MaxPool2d(2),
            *_conv_norm_relu(2 * width, 4 * width, groups),
            head(4 * width, num_classes),
        )
        init_convolutions(self)


def _conv_norm_relu(inputs: int, outputs: int, groups: int | None) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(outputs) if groups is None else nn.GroupNorm(groups, outputs)
    return conv3x3(inputs, outputs), norm, nn.ReLU()
