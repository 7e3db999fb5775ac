"""Where a warning points to."""

import os
import sys
from pathlib import Path

import torch

# Files whose frames a warning passes over, through which it was called: flatmin's, torch's, what torch has compiled.
INNER = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__))), "<eval_with_key>")


def depth_in_package() -> int:
    """The stacklevel, for a warning of the function that calls this, of the caller's line outside of flatmin."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INNER):
        depth, frame = depth + 1, frame.f_back
    return depth
