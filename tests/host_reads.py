"""Finds where the host reads a value of a tensor, for which it waits on an accelerator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.item, aten.equal, aten.masked_select}


class HostReads(TorchDispatchMode):
    """Inside, each read of a tensor's value by the host is an AssertionError, at the line that reads."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READS, f"the host reads a tensor: {function}"
        return function(*args, **(kwargs or {}))
