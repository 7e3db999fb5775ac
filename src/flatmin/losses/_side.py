"""A stream of its own beside the training's, and the graphs that are recorded and replayed on it.

All that CUDA alone can do is in `Cuda`; the tests have a `Side` without a GPU, which is as late as a GPU may be.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # classes whose memory is that of their values


class Side(Protocol):
    """A stream beside the current one. What is made for it is touched there alone, until it is joined."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a graph can use this tensor: one of its device, and none of a class of its own."""

    def busy(self) -> bool:
        """Whether somebody else records a graph now, who records these passes too."""

    def empty_like(self, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """New tensors of the side's, of their own dtype or another one."""

    def launch(self, work: Callable[[], object], given: list[Tensor]) -> Any:
        """Does ``work`` when what was launched so far is done; the current stream goes on.

        ``given`` are the current stream's tensors in it, whose memory is not used again before it is done. Returns a
        mark for `join`.
        """

    def join(self, mark: Any, made: list[Tensor]) -> None:
        """Lets the current stream wait for the mark, and not the host; it then uses ``made``, the side's tensors."""

    def refusing_waits(self) -> AbstractContextManager[None]:
        """Inside, what makes the host wait raises, as far as torch notices it."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records what ``run`` launches. Returns what does it again, and its outputs, which hold nothing before."""


class Cuda:
    """The `Side` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None

    def takes(self, tensor: Tensor) -> bool:
        """See `Side`."""
        return type(tensor) in PLAIN and tensor.device == self._device

    def busy(self) -> bool:
        """See `Side`."""
        return torch.cuda.is_current_stream_capturing()

    def empty_like(self, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """See `Side`."""
        with torch.cuda.stream(self._stream):
            return [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]

    def launch(self, work: Callable[[], object], given: list[Tensor]) -> Any:
        """See `Side`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        for tensor in given:
            tensor.record_stream(self._stream)
        return self._stream.record_event()

    def join(self, mark: Any, made: list[Tensor]) -> None:
        """See `Side`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in made:
            tensor.record_stream(current)

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        """See `Side`."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Side`."""
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # all graphs share a pool, as they run one after the other, but none that was given up
            self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps its workspace for whoever comes next, and may free it; the graph gets one in its own memory.
        clear: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        before = torch.cuda.stream(torch.cuda.current_stream(self._device))  # a recording that fails leaves its own
        with torch.cuda.device(self._device), before:
            clear()
            # A loader's thread that pins memory at the same time must not spoil the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
            clear()
        self._graphs.add(graph)
        return graph.replay, outputs


SIDES: dict[str, Callable[[torch.device], Side]] = {"cuda": Cuda}  # by the type of the device
