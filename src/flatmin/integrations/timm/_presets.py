"""With which settings networks were trained: the backbones that use MESA, and the paper's own on ImageNet."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..._checks import check_choice, check_integer
from ...averages import ema_decay
from ...errors import InvalidArgumentError

IMAGES = 1_281_167  # ImageNet-1k's


@dataclass(frozen=True)
class Preset:
    """The settings of SAF or MESA with which a network was trained on ImageNet-1k.

    Attributes:
        name: Its name.
        method: "saf" or "mesa".
        coefficient: Weight of the loss, as flatmin counts: what the authors' code has is converted.
        temperature: ``T``.
        start_epoch: First epoch, from 0, in which the loss is not 0.
        epochs: Number of epochs.
        source: Where it is from.
        decay: MESA: the decay of the average, at ``batch``.
        batch: Batch size over all devices.
        link: MESA: "softmax" or "sigmoid".
        lag: SAF: as in `flatmin.SAF`.
        optimizer: Arguments of timm's ``create_optimizer_v2``, as far as they are known.
    """

    name: str
    method: str
    coefficient: float
    temperature: float
    start_epoch: int
    epochs: int
    source: str
    decay: float | None = None
    batch: int = 4096
    link: str = "softmax"
    lag: int | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of `flatmin.SAF` or `flatmin.MESA`; MESA's average is another matter, see `decay_at`."""
        rest: dict[str, Any] = {"link": self.link} if self.method == "mesa" else {"lag": self.lag}
        common = {name: getattr(self, name) for name in ("coefficient", "temperature", "start_epoch")}
        return {**common, **rest}

    def task(self, updates_per_epoch: int) -> dict[str, Any]:
        """Arguments of `MESATask`, which counts steps of the optimizer instead of epochs.

        Raises:
            InvalidArgumentError: If the method is SAF.
        """
        self._check_is_mesa()
        start = self.start_epoch * check_integer("updates_per_epoch", updates_per_epoch, least=1)
        return {**{name: value for name, value in self.loss.items() if name != "start_epoch"}, "start_update": start}

    def decay_at(self, updates_per_epoch: int) -> float:
        """The decay of MESA's average for another batch size or data set: it reaches back as many epochs.

        Raises:
            InvalidArgumentError: If the method is SAF, or the horizon is not longer than one step.
        """
        self._check_is_mesa()
        return ema_decay(self.batch / IMAGES / (1 - (self.decay or 0)), updates_per_epoch)

    def _check_is_mesa(self) -> None:
        if self.method != "mesa":
            raise InvalidArgumentError(
                f"{self.name} has no average: make flatmin.SAF(num_samples, num_classes, **loss)"
            )


def preset(name: str, *, epochs: int | None = None) -> Preset:
    """Returns the settings with which a network was trained.

    Args:
        name: One of `PRESETS`.
        epochs: Number of epochs of your training: the loss starts after the same share of it. The paper's starts after
            5 epochs whatever their number. None: the authors' number.

    Raises:
        InvalidArgumentError: (a ValueError) if there is no such name.

    Example:
        >>> from flatmin.integrations.timm import preset
        >>> found = preset("mila_small", epochs=100)
        >>> found.loss
        {'coefficient': 1.5, 'temperature': 1.0, 'start_epoch': 25, 'link': 'softmax'}
        >>> round(found.decay_at(updates_per_epoch=1251), 6)
        0.9999
    """
    found = PRESETS[check_choice("name", name, tuple(PRESETS))]
    if epochs is None:
        return found
    share = 1.0 if name.startswith("paper") else check_integer("epochs", epochs, least=1) / found.epochs
    return replace(found, epochs=epochs, start_epoch=round(found.start_epoch * share))


def _nvlabs(name: str, mesa: float, source: str, start_epoch: int = 78) -> Preset:
    """Their loss is ``mesa * 50 * KL`` at T = 3, where flatmin's has T**2; it begins after a share of 310 epochs."""
    return Preset(name, "mesa", round(mesa * 50 / 9, 4), 3.0, start_epoch, 310, source, decay=0.9998)


def _cross_entropy(name: str, mesa: float, source: str, *, decay: float, batch: int) -> Preset:
    """Their loss is the cross entropy to the average's softmax, which has the gradient of the divergence."""
    return Preset(name, "mesa", mesa, 1.0, 75, 300, source, decay=decay, batch=batch)


def _paper(method: str, network: str, epochs: int, **optimizer: Any) -> Preset:
    source = "Du et al. 2022, arXiv 2205.14083, section 4 and the authors' code"
    mine: dict[str, Any] = {"coefficient": 0.8, "decay": 0.9998} if method == "mesa" else {"coefficient": 0.3, "lag": 3}
    common: dict[str, Any] = {"temperature": 5.0, "start_epoch": 5, "epochs": epochs, "source": source}
    return Preset(f"paper_{method}_{network}", method, **common, **mine, optimizer=MappingProxyType(optimizer))


_FASTERVIT = "github.com/NVlabs/FasterViT, the commands of TRAINING.md, which differ from its configs"
_MAMBAVISION = "github.com/NVlabs/MambaVision, configs"
_EFFICIENTVIT = "github.com/mit-han-lab/efficientvit, configs/imagenet"
_MILA = "github.com/LeapLabTHU/MLLA, cfgs and main.py"
_VSSD = "github.com/YuHengsss/VSSD, configs/vssd and main.py"
_SPATIAL = "github.com/EdwardChasel/Spatial-Mamba, configs/spatialmamba and main.py"
_SIZES = (("tiny", 1.0), ("small", 1.5), ("base", 2.0))

_ALL = (
    *(_paper(method, "resnet", 90, opt="momentum", lr=1.4, momentum=0.9) for method in ("saf", "mesa")),
    *(_paper(method, "vit_small_patch32", 300, opt="adamw", betas=(0.9, 0.999)) for method in ("saf", "mesa")),
    _nvlabs("faster_vit_0", 0.1, _FASTERVIT),
    _nvlabs("faster_vit_1", 0.2, _FASTERVIT),
    _nvlabs("faster_vit_2", 0.5, _FASTERVIT),
    _nvlabs("faster_vit_3", 0.5, _FASTERVIT, start_epoch=94),
    *(_nvlabs(f"faster_vit_{size}", 5.0, _FASTERVIT) for size in (4, 5, 6)),
    _nvlabs("mambavision_tiny", 0.5, _MAMBAVISION),
    _nvlabs("mambavision_tiny2", 0.75, _MAMBAVISION),
    _nvlabs("mambavision_small", 1.0, _MAMBAVISION),
    _nvlabs("mambavision_base", 1.0, _MAMBAVISION, start_epoch=94),
    *(_nvlabs(f"mambavision_{size}", 6.0, _MAMBAVISION) for size in ("large", "large2")),
    *(
        Preset(name, "mesa", mesa, 1.0, 75, 300, _EFFICIENTVIT, decay=0.9998, batch=1024, link="sigmoid")
        for name, mesa in (("efficientvit_l1", 2.0), ("efficientvit_l2", 2.75), ("efficientvit_l3", 3.5))
    ),
    *(_cross_entropy(f"mila_{size}", mesa, _MILA, decay=0.9996, batch=4096) for size, mesa in _SIZES),
    *(_cross_entropy(f"vssd_{size}", mesa, _VSSD, decay=0.9999, batch=1024) for size, mesa in _SIZES),
    *(_cross_entropy(f"spatialmamba_{size}", mesa, _SPATIAL, decay=0.9999, batch=1024) for size, mesa in _SIZES),
)
PRESETS = MappingProxyType({each.name: each for each in _ALL})
