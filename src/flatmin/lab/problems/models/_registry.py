"""Networks by name: ours, and those of timm and torchvision where they are installed."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import nn

from ...._checks import check_choice, nearest
from ....errors import InvalidArgumentError, MissingDependencyError, require
from ._cnn import SmallCNN
from ._cnn1d import SmallCNN1d
from ._layers import check_sizes
from ._pyramidnet import pyramidnet
from ._resnet import resnet18
from ._wide_resnet import wide_resnet


def create_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Returns a new network with random weights.

    timm and torchvision are imported when one of their networks is asked for. Some of theirs want large
    images; ``torchvision/googlenet`` and ``torchvision/inception_v3`` return more than logits in training.

    Args:
        name: One of :func:`model_names`, ``"timm/NAME"`` or ``"torchvision/NAME"``.
        in_channels: Channels of the images or signals; 3 for torchvision.
        num_classes: Number of logits.

    Raises:
        InvalidArgumentError: If there is no network of that name (the message has the nearest), or if it
            cannot have these sizes.
        MissingDependencyError: If the library of the network is not installed or does not work.

    Example:
        >>> type(create_model("cnn", 1, 10)).__name__
        'SmallCNN'
    """
    check_sizes(in_channels, num_classes)
    library, _, architecture = name.partition("/")
    if architecture and library in _LIBRARIES:
        return _LIBRARIES[library](architecture, in_channels, num_classes)
    _check_own(name)
    return _BUILDERS[name](in_channels, num_classes)


def input_dimensions(name: str) -> int:
    """Returns the number of dimensions that an input of a network has besides its channels.

    Args:
        name: As `create_model` takes it. Those of timm and torchvision are for images, and not looked up.

    Returns:
        2 for images, 1 for signals.

    Raises:
        InvalidArgumentError: If there is no network of that name.

    Example:
        >>> input_dimensions("resnet18"), input_dimensions("cnn1d")
        (2, 1)
    """
    library, _, architecture = name.partition("/")
    if architecture and library in _LIBRARIES:
        return 2
    _check_own(name)
    return 1 if name in _FOR_SIGNALS else 2


def model_names() -> list[str]:
    """Returns the names of flatmin's own networks, sorted; those of timm and torchvision come on top.

    Example:
        >>> model_names()
        ['cnn', 'cnn-gn', 'cnn1d', 'pyramidnet-110', 'resnet18', 'wrn-28-10']
    """
    return sorted(_BUILDERS)


def _check_own(name: str) -> None:
    check_choice("model", name, [*model_names(), *(f"{library}/NAME" for library in _LIBRARIES)])


def _from_timm(architecture: str, in_channels: int, num_classes: int) -> nn.Module:
    timm = _import("timm")
    if not timm.is_model(architecture):
        raise _unknown("timm", architecture, timm.list_models())
    model: nn.Module = timm.create_model(architecture, pretrained=False, in_chans=in_channels, num_classes=num_classes)
    return model


def _from_torchvision(architecture: str, in_channels: int, num_classes: int) -> nn.Module:
    models = _import("torchvision.models")
    known = models.list_models(module=models)  # the classifiers, without detection, segmentation and video
    if architecture not in known:
        raise _unknown("torchvision", architecture, known)
    if in_channels != 3:
        raise InvalidArgumentError(f"in_channels must be 3 for torchvision networks, got {in_channels}")
    model: nn.Module = models.get_model(architecture, weights=None, num_classes=num_classes)
    return model


def _import(module: str) -> ModuleType:
    """Imports a library that, built for another version of torch, fails with more than an ``ImportError``."""
    library = module.split(".")[0]
    try:
        return require(module, install=f"flatmin[{library}]")
    except (AttributeError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"{library!r} is installed but does not work with torch {torch.__version__} ({error}); "
            f"pip install --upgrade {library}"
        ) from error


def _unknown(library: str, architecture: str, known: list[str]) -> InvalidArgumentError:
    prefix = f"{library}/"
    hint = nearest(architecture, known, prefix=prefix)
    return InvalidArgumentError(f"unknown model {prefix + architecture!r}{hint}; {library} lists what it has")


_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "cnn-gn": partial(SmallCNN, groups=4),
    "cnn1d": SmallCNN1d,
    "pyramidnet-110": pyramidnet,
    "resnet18": resnet18,
    "wrn-28-10": wide_resnet,
}
_FOR_SIGNALS = frozenset({"cnn1d"})  # all others are for images
_LIBRARIES: dict[str, Callable[[str, int, int], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}
