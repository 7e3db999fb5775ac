"""Where a run is done."""

import torch

from ...errors import InvalidArgumentError


def resolve_device(name: str) -> torch.device:
    """Returns the device of that name; ``"auto"`` is the accelerator if there is one.

    Raises:
        InvalidArgumentError: If there is no such device here.
    """
    if name == "auto":
        # A CUDA build names its accelerator also on a machine that has none.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgumentError(f"device {name!r} cannot be used here; try --device auto or cpu") from error
    return device
