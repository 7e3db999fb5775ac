"""ResNet-18 for small images, the network of most CIFAR experiments of SAM, SAF and MESA.

The blocks of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385)::

    y = ReLU(x' + BN(conv(ReLU(BN(conv(x))))))        x' = x, or BN(conv1x1(x)) where the shape changes

On 32x32 images the stem is one 3x3 convolution, without the stride and the max-pooling of the ImageNet
network.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import check_sizes, conv1x1, conv3x3, head, init_convolutions


def resnet18(in_channels: int, num_classes: int) -> nn.Sequential:
    """Returns ResNet-18 for small images; 11.2 million parameters.

    It takes images of shape ``(batch, in_channels, height, width)``, 8x8 or larger, and returns logits of
    shape ``(batch, num_classes)``.

    Args:
        in_channels: Channels of the images, such as 1 for gray and 3 for color.
        num_classes: Number of logits.

    Raises:
        InvalidArgumentError: If one of them is not an integer of at least 1.

    Example:
        >>> sum(parameter.numel() for parameter in resnet18(3, 10).parameters())
        11173962
    """
    check_sizes(in_channels, num_classes)
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(conv3x3(in_channels, 64), nn.BatchNorm2d(64), nn.ReLU()),
            stage1=_stage(64, 64, stride=1),
            stage2=_stage(64, 128, stride=2),
            stage3=_stage(128, 256, stride=2),
            stage4=_stage(256, 512, stride=2),
            head=head(512, num_classes),
        )
    )
    init_convolutions(model)
    return model


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, normalized before they are added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.extend([conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs, stride), _Block(outputs, outputs, 1))
