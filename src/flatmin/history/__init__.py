"""Where SAF keeps a network's past outputs."""

from ._base import History as History
from ._dense import DenseHistory as DenseHistory

__all__ = ["DenseHistory", "History"]
