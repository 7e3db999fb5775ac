"""Wide residual networks, of which WRN-28-10 is the large CIFAR network of SAM, SAF and MESA.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv:1605.07146). Normalization comes before the
convolutions::

    a = ReLU(BN(x))
    y = x' + conv(dropout(ReLU(BN(conv(a)))))         x' = x, or conv1x1(a) where the width changes
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from ...._checks import check_integer, check_number
from ....errors import InvalidArgumentError
from ._layers import check_sizes, conv1x1, conv3x3, head, init_convolutions


def wide_resnet(
    in_channels: int, num_classes: int, *, depth: int = 28, widen: int = 10, dropout: float = 0.0
) -> nn.Sequential:
    """Returns WRN-``depth``-``widen``; WRN-28-10 has 36.5 million parameters.

    It takes images of shape ``(batch, in_channels, height, width)``, 8x8 or larger, and returns logits of
    shape ``(batch, num_classes)``.

    Args:
        in_channels: Channels of the images, such as 1 for gray and 3 for color.
        num_classes: Number of logits.
        depth: Number of convolutions, 6n + 4 for n blocks in each of the three groups.
        widen: How many times wider than 16, 32 and 64 channels the three groups are.
        dropout: Probability of dropout between the two convolutions of a block, 0 <= dropout < 1.

    Raises:
        InvalidArgumentError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> wide_resnet(3, 10, depth=10, widen=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_sizes(in_channels, num_classes)
    check_integer("depth", depth, least=10)
    check_integer("widen", widen, least=1)
    check_number("dropout", dropout, least=0, below=1)
    blocks, rest = divmod(depth - 4, 6)
    if rest:
        raise InvalidArgumentError(f"depth must be 6n + 4, such as 10, 16 or 28, got {depth!r}")
    wide = 16 * widen
    model = nn.Sequential(
        OrderedDict(
            stem=conv3x3(in_channels, 16),
            group1=_group(16, wide, blocks, stride=1, dropout=dropout),
            group2=_group(wide, 2 * wide, blocks, stride=2, dropout=dropout),
            group3=_group(2 * wide, 4 * wide, blocks, stride=2, dropout=dropout),
            norm=nn.BatchNorm2d(4 * wide),
            relu=nn.ReLU(),
            head=head(4 * wide, num_classes),
        )
    )
    init_convolutions(model)
    return model


class _Block(nn.Module):
    """Two pre-activated 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.residual = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            conv3x3(outputs, outputs),
        )
        self.project = conv1x1(inputs, outputs, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm(x))
        shortcut = x if self.project is None else self.project(activated)
        y: Tensor = shortcut + self.residual(activated)
        return y


def _group(inputs: int, outputs: int, blocks: int, *, stride: int, dropout: float) -> nn.Sequential:
    first = _Block(inputs, outputs, stride, dropout)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1, dropout) for _ in range(blocks - 1)))
