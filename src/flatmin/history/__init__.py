"""Where SAF keeps a network's past outputs."""

from ._base import Batch as Batch
from ._base import History as History
from ._choose import make_history as make_history
from ._dense import DenseHistory as DenseHistory
from ._lowrank import LowRankHistory as LowRankHistory
from ._quantized import QuantizedHistory as QuantizedHistory
from ._topk import TopKHistory as TopKHistory

__all__ = [
    "Batch",
    "DenseHistory",
    "History",
    "LowRankHistory",
    "QuantizedHistory",
    "TopKHistory",
    "make_history",
]
