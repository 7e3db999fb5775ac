"""A small convolutional network for signals, such as those of MNIST-1D."""

from torch import nn

from ...._checks import check_integer
from ._layers import check_sizes, init_convolutions


class SmallCNN1d(nn.Sequential):
    """Three convolutions over 5 places with batch normalization, the average over the signal and a linear layer.

    `SmallCNN` in one dimension; as in the network of MNIST-1D's authors, strides shorten the signal. Takes
    signals of shape ``(batch, in_channels, length)``, of any length, and returns logits of shape
    ``(batch, num_classes)``.

    Args:
        in_channels: Channels of the signals.
        num_classes: Number of logits.
        width: Channels after the first convolution; the next two double them, and halve the length.

    Raises:
        InvalidArgumentError: If one of them is not an integer of at least 1.

    Example:
        >>> import torch
        >>> SmallCNN1d(1, 10)(torch.zeros(2, 1, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int, *, width: int = 16) -> None:
        check_sizes(in_channels, num_classes)
        check_integer("width", width, least=1)
        super().__init__(
            *_conv_bn_relu(in_channels, width, stride=1),
            *_conv_bn_relu(width, 2 * width, stride=2),
            *_conv_bn_relu(2 * width, 4 * width, stride=2),
            nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)),
        )
        init_convolutions(self)


def _conv_bn_relu(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv1d(inputs, outputs, 5, stride, padding=2, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()
