"""What the networks share: two convolutions, the head, the initial weights and the check of the sizes."""

from torch import nn

from ...._checks import check_integer


def check_sizes(in_channels: int, num_classes: int) -> None:
    """Raises ``InvalidArgumentError`` unless both are integers of at least 1."""
    check_integer("in_channels", in_channels, least=1)
    check_integer("num_classes", num_classes, least=1)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Returns a 3x3 convolution without bias; at stride 1 it keeps the image size."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Returns a 1x1 convolution without bias, the projection of a shortcut."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def head(features: int, num_classes: int) -> nn.Sequential:
    """Returns the average over the image and a linear layer: ``(batch, features, h, w)`` to logits."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes))


def init_convolutions(model: nn.Module) -> None:
    """Draws the convolutions as He et al. 2015 do, from a normal distribution of variance 2 / fan-out."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
