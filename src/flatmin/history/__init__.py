"""What SAF remembers: the past logits of every sample, and in which form."""

from ._choose import make_history as make_history
from ._codec import Codec as Codec
from ._dense import Dense as Dense
from ._history import History as History
from ._lowrank import LowRank as LowRank
from ._quantized import Quantized as Quantized
from ._topk import TopK as TopK

__all__ = ["Codec", "Dense", "History", "LowRank", "Quantized", "TopK", "make_history"]
