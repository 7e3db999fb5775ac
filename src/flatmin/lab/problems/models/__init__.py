"""The networks of the papers, and those of timm and torchvision by name."""

from ._cnn import SmallCNN as SmallCNN
from ._cnn1d import SmallCNN1d as SmallCNN1d
from ._pyramidnet import pyramidnet as pyramidnet
from ._registry import create_model as create_model
from ._registry import input_dimensions as input_dimensions
from ._registry import model_names as model_names
from ._resnet import resnet18 as resnet18
from ._wide_resnet import wide_resnet as wide_resnet

__all__ = [
    "SmallCNN",
    "SmallCNN1d",
    "create_model",
    "input_dimensions",
    "model_names",
    "pyramidnet",
    "resnet18",
    "wide_resnet",
]
