"""Optimizers that move the weights before the gradient is taken."""

from . import schedules as schedules
from ._asam import ASAM as ASAM
from ._base import SharpnessAware as SharpnessAware
from ._esam import ESAM as ESAM
from ._esam import PerSampleClosure as PerSampleClosure
from ._friendly_sam import FriendlySAM as FriendlySAM
from ._gsam import GSAM as GSAM
from ._looksam import LookSAM as LookSAM
from ._msam import MSAM as MSAM
from ._perturbation import Elementwise as Elementwise
from ._perturbation import normalization_parameters as normalization_parameters
from ._s2sam import S2SAM as S2SAM
from ._sam import SAM as SAM
from ._squat import SQuAT as SQuAT
from .schedules import Adaptive as Adaptive
from .schedules import Every as Every
from .schedules import Late as Late
from .schedules import RhoByLR as RhoByLR
from .schedules import Schedule as Schedule
from .schedules import Sometimes as Sometimes

__all__ = [
    "ASAM",
    "Adaptive",
    "ESAM",
    "Elementwise",
    "Every",
    "FriendlySAM",
    "GSAM",
    "Late",
    "LookSAM",
    "MSAM",
    "PerSampleClosure",
    "RhoByLR",
    "S2SAM",
    "SAM",
    "SQuAT",
    "Schedule",
    "SharpnessAware",
    "Sometimes",
    "normalization_parameters",
    "schedules",
]
