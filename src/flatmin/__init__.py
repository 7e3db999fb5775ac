"""flatmin: train PyTorch networks into flat minima at the price of the plain optimizer."""

from . import _command as _command  # before torch is imported, which takes seconds
from . import averages as averages
from . import errors as errors
from . import history as history
from . import indices as indices
from . import losses as losses
from . import optim as optim
from . import sharpness as sharpness
from .averages import EMA as EMA
from .averages import LAWA as LAWA
from .averages import SwitchEMA as SwitchEMA
from .averages import ema_decay as ema_decay
from .indices import indexed as indexed
from .indices import with_indices as with_indices
from .losses import MESA as MESA
from .losses import SAF as SAF
from .losses import OnlineLabelSmoothing as OnlineLabelSmoothing
from .losses import logit_squeezing as logit_squeezing
from .optim import ASAM as ASAM
from .optim import ESAM as ESAM
from .optim import GSAM as GSAM
from .optim import MSAM as MSAM
from .optim import S2SAM as S2SAM
from .optim import SAM as SAM
from .optim import FriendlySAM as FriendlySAM
from .optim import LookSAM as LookSAM
from .optim import SQuAT as SQuAT

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "EMA",
    "ESAM",
    "FriendlySAM",
    "GSAM",
    "LAWA",
    "LookSAM",
    "MESA",
    "MSAM",
    "OnlineLabelSmoothing",
    "S2SAM",
    "SAF",
    "SAM",
    "SQuAT",
    "SwitchEMA",
    "averages",
    "ema_decay",
    "errors",
    "history",
    "indexed",
    "indices",
    "logit_squeezing",
    "losses",
    "optim",
    "sharpness",
    "with_indices",
]
