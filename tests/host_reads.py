"""An accelerator that is none: tensors in main memory that say they are elsewhere, and what reads them on the host.

A GPU computes while the host runs ahead. Whatever the host reads (``item``, ``bool``, ``nonzero``, a copy to main
memory) makes it wait, and the GPU run empty. On a CPU that costs nothing and shows nowhere; here it raises::

    with HostReads() as device:
        saf.to(DEVICE), model.to(DEVICE)
        logits = model(x.to(DEVICE, non_blocking=True))
        with device.refused():          # anything that would wait raises HostReadError, at its line
            saf(logits, index).backward()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # what the tensors say: torch has one device at least that is always there

aten = torch.ops.aten
# What waits on CUDA: it returns a number, or tensors whose sizes depend on values, or checks its result on the host.
WAITS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.nonzero,
    aten.argwhere,
    aten.masked_select,
    aten.bincount,
    aten.repeat_interleave,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.linalg_cholesky,
    aten.linalg_eig,
    aten._linalg_check_errors,
    aten.linalg_lstsq,
    aten.linalg_matrix_exp,
    aten.multinomial,
    aten.histc,
    aten.mode,
    aten.embedding_renorm_,
    aten._ctc_loss,
    aten._to_sparse,
    aten._coalesce,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # waits if given a mask


class HostReadError(AssertionError):
    """The host would wait for the accelerator here."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on `DEVICE`, and the one in main memory that it stands for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"

    def __setitem__(self, index: Any, value: Any) -> None:
        if _refusing and not isinstance(value, Tensor) and self[index].ndim == 0:
            raise HostReadError("a number is assigned to an element: on CUDA its copy waits; write x[i].fill_(number)")
        super().__setitem__(index, value)

    def tolist(self) -> Any:
        _refuse("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class HostReads(TorchDispatchMode):
    """Inside, `DEVICE` is an accelerator; and inside `refused`, the host may not wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(each, OnDevice) for each in tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if there or _meant(kwargs.get("device")) else func(*args, **kwargs)

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Inside, whatever would wait raises `HostReadError`."""
        _refusing.append(True)
        try:
            yield
        finally:
            _refusing.pop()


_refusing: list[bool] = []


def _refuse(what: str) -> None:
    if _refusing:
        raise HostReadError(f"{what}: the host would wait for the accelerator")


def _meant(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    _check(func, packet, args, kwargs)
    inside: Callable[[Any], Any] = lambda each: each.inner if isinstance(each, OnDevice) else each  # noqa: E731
    to_host = packet is aten._to_copy and kwargs.get("device") is not None and not _meant(kwargs["device"])
    given = {name: value for name, value in kwargs.items() if name != "device" and name != "pin_memory"}
    if "device" in kwargs:
        given["device"] = torch.device("cpu")
    out = func(*tree_map(inside, args), **tree_map(inside, given))
    if to_host or (packet is aten.copy_ and not isinstance(args[0], OnDevice)):
        return out
    out = tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check(func: Any, packet: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises `HostReadError` if the host would wait; and an error if a tensor is where CUDA would not take it."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if packet in WAITS:
        _refuse(str(func))
    if packet in INDEXED:
        for each in args[1]:
            if isinstance(each, Tensor) and (each.dtype in (torch.bool, torch.uint8) or not isinstance(each, OnDevice)):
                _refuse(f"{func} with a mask, or an index on the host")
        return
    if packet in (aten._to_copy, aten.copy_):
        there = {isinstance(each, OnDevice) for each in tensors}
        crosses = len(there) == 2 or (packet is aten._to_copy and there == {not _meant(kwargs.get("device", DEVICE))})
        blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
        if crosses and blocking:
            _refuse(f"{func} between main memory and the accelerator")
        return
    if any(each.ndim and not isinstance(each, OnDevice) for each in tensors):
        raise RuntimeError(f"{func} was given tensors in main memory and on the accelerator")


class NoReads(TorchDispatchMode):
    """Inside, tensors in main memory may not be read either: for what treats them as if they were elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITS:
            raise HostReadError(f"the host reads a tensor: {func}")
        return func(*args, **(kwargs or {}))
