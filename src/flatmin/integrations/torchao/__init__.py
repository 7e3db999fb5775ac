"""torchao's quantisation-aware training: step sizes, weights and fake quantisers of a prepared network, for `SQuAT`.

The order is: train in float; ``quantize_(model, QATConfig(..., step="prepare"))``; ``initialize_fake_quantizers``; the
optimizer, with the step sizes in a group of their own; `SQuAT`; train; `convert`; save.

    pip install 'flatmin[torchao]'
"""

from ._prepared import convert as convert
from ._prepared import quantizers as quantizers
from ._prepared import step_sizes as step_sizes
from ._prepared import weights as weights

__all__ = ["convert", "quantizers", "step_sizes", "weights"]
