"""Each sample's own index: with the batches of a loader (`with_indices`), or with the sample itself (`indexed`)."""

from ._collate import collate as collate
from ._dataset import IndexedDataset as IndexedDataset
from ._dataset import indexed as indexed
from ._indexed import Indexed as Indexed
from ._indexed import split as split
from ._loader import with_indices as with_indices

__all__ = ["Indexed", "IndexedDataset", "collate", "indexed", "split", "with_indices"]
