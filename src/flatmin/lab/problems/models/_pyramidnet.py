"""PyramidNet, the largest CIFAR network of SAM, SAF and MESA.

Han, Kim & Kim, "Deep Pyramidal Residual Networks", CVPR 2017 (arXiv:1610.02915), the additive network of
basic blocks. Every one of the N blocks is wider than the one before, and its shortcut has no weights::

    width of block k = 16 + alpha k / N, rounded
    y = pad(x') + BN(conv(ReLU(BN(conv(BN(x))))))     x' = x, or its 2x2 averages where the image shrinks

``pad`` adds channels of zeros. Widths are rounded to the nearest, halves up, as in the authors' code; the
paper writes a floor, which gives 2% fewer parameters at alpha = 48 and the same at alpha = 270.
"""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from ...._checks import check_integer
from ....errors import InvalidArgumentError
from ._layers import check_sizes, conv3x3, head, init_convolutions


def pyramidnet(in_channels: int, num_classes: int, *, depth: int = 110, alpha: int = 270) -> nn.Sequential:
    """Returns PyramidNet-``depth``; PyramidNet-110 with alpha = 270 has 28.5 million parameters.

    It takes images of shape ``(batch, in_channels, height, width)``, 8x8 or larger, and returns logits of
    shape ``(batch, num_classes)``.

    Args:
        in_channels: Channels of the images, such as 1 for gray and 3 for color.
        num_classes: Number of logits.
        depth: Number of convolutions and linear layers, 6n + 2 for n blocks in each of the three groups.
        alpha: Channels that the last block has more than the 16 of the stem.

    Raises:
        InvalidArgumentError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> pyramidnet(3, 10, depth=8, alpha=6)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_sizes(in_channels, num_classes)
    check_integer("depth", depth, least=8)
    check_integer("alpha", alpha, least=1)
    per_group, rest = divmod(depth - 2, 6)
    if rest:
        raise InvalidArgumentError(f"depth must be 6n + 2, such as 8, 20 or 110, got {depth!r}")
    widths = _widths(3 * per_group, alpha)
    blocks = [
        _Block(inputs, outputs, stride=2 if index in (per_group, 2 * per_group) else 1)
        for index, (inputs, outputs) in enumerate(pairwise(widths))
    ]
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0])),
            blocks=nn.Sequential(*blocks),
            norm=nn.BatchNorm2d(widths[-1]),
            relu=nn.ReLU(),
            head=head(widths[-1], num_classes),
        )
    )
    init_convolutions(model)
    return model


def _widths(blocks: int, alpha: int) -> list[int]:
    """Returns the channels of the stem and after each block; in integers, to round exactly."""
    return [16 + (2 * alpha * block + blocks) // (2 * blocks) for block in range(blocks + 1)]


class _Block(nn.Module):
    """Two 3x3 convolutions with three normalizations and one ReLU around a zero-padded shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.added = outputs - inputs
        self.shrinks = stride != 1

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if self.shrinks else x
        y: Tensor = F.pad(shortcut, (0, 0, 0, 0, 0, self.added)) + self.residual(x)
        return y
