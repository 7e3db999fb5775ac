"""Numbers of an accelerator that reach the host without anyone waiting for them."""

from collections.abc import Callable

import torch
from torch import Tensor


class Arrival:
    """A tensor on its way to the host.

    Args:
        tensor: The tensor; on the CPU it is there already.

    Attributes:
        value: The tensor on the host, once `is_here`; None if it cannot be had without waiting.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.value: Tensor | None = tensor
        self._query: Callable[[], bool] | None = None
        if tensor.device.type == "cpu":
            return
        if tensor.device.type != "cuda":
            self.value = None
            return
        self.value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.value.copy_(tensor, non_blocking=True)
        make_event: Callable[[], torch.cuda.Event] = torch.cuda.Event  # torch leaves it without types
        copied = make_event()
        copied.record(torch.cuda.current_stream(tensor.device))
        self._query = copied.query

    def is_here(self) -> bool:
        """Whether the value can be read."""
        return self._query is None or self._query()
