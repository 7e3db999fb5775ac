"""A CUDA stream and its graphs that are none: what a GPU does beside the training, on the CPU and as late as it may.

What is launched runs when somebody waits for it, in its order, or at once if not `late`. A recorded graph is a list of
operations on tensors that stay where they are: it is replayed without any Python of the network's, and whoever moves
a tensor away under it gets the old values, as on a GPU. It keeps alive what is made while it is recorded, and nothing
else: a replay raises where a GPU would read and write memory that is somebody else's by then. Use it in place of
`flatmin.losses._side.Cuda`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef


class Recorder(TorchDispatchMode):
    """Keeps the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any]] = []
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(each) for each in tree_leaves((args, kwargs))}
        self._made.update((id(each), each) for each in tree_leaves(out) if id(each) not in given)
        self.operations.append((func, tree_map_only(Tensor, self._noted, (args, kwargs or {}, out))))
        return out

    def _noted(self, tensor: Tensor) -> Any:
        return tensor if id(tensor) in self._made else TensorWeakRef(tensor)

    @torch.no_grad()
    def replay(self) -> None:
        """Runs them again on the same tensors, and puts what they make where it was made before."""
        for func, noted in self.operations:
            args, kwargs, out = tree_map_only(TensorWeakRef, _found, noted)
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _found(reference: TensorWeakRef) -> Tensor:
    tensor = reference()
    assert tensor is not None, "a graph uses memory that is free"
    return tensor


class Late:
    """A `Side` on the CPU.

    Attributes:
        events: What was asked of it, in order, and whatever else a test adds.
        crossed: The tensors that were told to cross to the side, and back.
    """

    def __init__(self, device: str = "cpu", *, late: bool = True) -> None:
        self.device = torch.device(device)
        self.late = late
        self.events: list[str] = []
        self.crossed: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.recording = False
        self.own: list[TensorWeakRef] = []
        self._queue: list[Callable[[], object]] = []
        self._done = 0

    def __call__(self, device: torch.device) -> "Late":
        assert device == self.device
        return self

    def takes(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def busy(self) -> bool:
        return self.recording

    def empty_like(self, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        made = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
        for each in made:
            each.fill_(float("nan")) if each.is_floating_point() else each.zero_()
        self.own += map(TensorWeakRef, made)
        return made

    def launch(self, work: Callable[[], object], given: list[Tensor]) -> int:
        self.events.append("launch")
        self.crossed[0].extend(given)
        self._queue.append(work)
        if not self.late:
            self._run(len(self._queue))
        return len(self._queue)

    def join(self, mark: int, made: list[Tensor]) -> None:
        self.events.append("join")
        self.crossed[1].extend(made)
        self._run(mark)

    def _run(self, mark: int) -> None:
        while self._done < mark:
            self._done += 1
            self._queue[self._done - 1]()
            self._queue[self._done - 1] = lambda: None

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.events.append("record")
        with Recorder() as recorder:
            outputs = run()
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor):
                each.fill_(float("nan"))

        def replay() -> None:
            self.events.append("replay")
            recorder.replay()

        return replay, outputs
