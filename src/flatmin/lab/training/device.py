"""The device of a run."""

import gc

import torch

from ...errors import InvalidArgumentError


def resolve_device(name: str) -> torch.device:
    """Returns the device of this name; ``"auto"`` is the accelerator if there is one, and the CPU otherwise.

    Raises:
        InvalidArgumentError: If there is no such device here.
    """
    if name == "auto":
        # A CUDA build of torch names its accelerator even on a machine without one.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgumentError(f"device {name!r:.80} cannot be used here; try --device auto or cpu") from error
    return device


def release() -> None:
    """Gives the memory of a GPU that nothing uses any more back, for another run or process.

    An optimizer and an average that is attached to it hold each other, with all that the average has recorded.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
