"""Where a warning points to."""

import os
import sys
from pathlib import Path

from torch import nn

# Files whose frames a warning passes over: flatmin's, and that of nn.Module.__call__.
INNER = (f"{Path(__file__).parents[1]}{os.sep}", nn.Module.__call__.__code__.co_filename)


def depth_in_package() -> int:
    """The stacklevel, for a warning of the function that calls this, of the caller's line outside of flatmin."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INNER):
        depth, frame = depth + 1, frame.f_back
    return depth
