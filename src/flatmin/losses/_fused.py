"""When SAF's step runs as one kernel, and how: the one place that decides."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ..history import Dense, History, Quantized
from ..history._ranks import occurrences
from ..history._store import move
from ._masked import filling, masked_filled

KERNEL_DEVICES = {"cuda"}  # tests add "cpu", where Triton's interpreter runs the kernel
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of logits
ROW_DTYPES = (torch.float32, torch.float16)
BLOCK = 4096  # most classes that are read at a time


class Clock:
    """The epoch as a tensor on the device, so that a captured step reads the current one. A copy begins anew."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._told: int | None = None

    def tell(self, epoch: int) -> None:
        """Sets the epoch, if anything reads it."""
        if self._tensor is not None and self._told != epoch:
            self._tensor.fill_(epoch)
            self._told = epoch

    def on(self, device: torch.device, epoch: int) -> Tensor:
        """The epoch, int32, on ``device``.

        Raises:
            InvalidArgumentError: If it would be made inside a CUDA graph, which would set it again in each replay.
        """
        if self._tensor is None or self._tensor.device != device:
            if capturing(device):
                raise InvalidArgumentError("call SAF once outside of the CUDA graph before it is captured, to warm up")
            self._tensor, self._told = torch.full((), epoch, dtype=torch.int32, device=device), epoch
        self.tell(epoch)
        return self._tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"_tensor": None, "_told": None}


def fused_step(
    history: History,
    logits: Tensor,
    index: Tensor,
    epoch: int,
    clock: Clock,
    *,
    begin: int,
    coefficient: float,
    temperature: float,
) -> tuple[Tensor | None, Tensor | None] | None:
    """Compares and records a batch in one kernel, if it can.

    Args:
        history: What is remembered.
        logits: The network's logits, shape (B, C), with a gradient.
        index: Sample indices, shape (B,); on the host they are known to be in range.
        epoch: The current epoch.
        clock: Tells the kernel the epoch.
        begin: The first epoch that compares.
        coefficient: Weight of the loss.
        temperature: ``T``.

    Returns:
        The loss and which samples were compared, bool, shape (B,); both None if nothing can be compared in this epoch.
        None alone where the plain operations must run: nothing was done then.

    Raises:
        InvalidArgumentError: If a CUDA graph is being captured, and its replays would go on with this epoch or batch.
    """
    captured = capturing(logits.device)
    kernel = _kernel() if _fits(history, logits) and not _broken else None
    if captured and (kernel is None or index.device != logits.device):
        raise InvalidArgumentError(
            "a CUDA graph would replay SAF with this batch's index and this epoch for good: give the index on the "
            "device, with history='dense', 'half', 'int8', 'int6' or 'int4' on one rank, or leave SAF out of the graph"
        )
    if kernel is None:
        return None
    history.store.meet(index, epoch)  # on one rank it only checks
    compare = coefficient > 0 and (captured or epoch >= begin)
    samples, recorded = _order(index, logits.device)
    if index.device.type != "cpu":
        history.store.epochs[0].index_select(0, samples)  # the device itself catches an index out of range
    gradients = torch.empty(logits.shape if compare else 0, dtype=torch.float32, device=logits.device)
    losses = gradients.new_empty(len(logits))
    compared = torch.empty(len(logits), dtype=torch.int8, device=logits.device)
    arguments = (samples, recorded, clock.on(logits.device, epoch), gradients, losses, compared)
    launch = functools.partial(_launch, kernel, history, logits.detach(), *arguments)
    scale = coefficient * temperature**2 / len(logits)
    if not _works(functools.partial(launch, compare=compare, begin=begin, temperature=temperature, scale=scale)):
        return None
    if not compare:
        return None, None
    mask = compared.view(torch.bool)
    given = (logits, losses, gradients, mask, scale, temperature)
    loss: Tensor = _Loss.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return loss, mask


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Loss(torch.autograd.Function):
    """The sum of the rows' losses, whose gradient is known already."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, losses: Tensor, gradients: Tensor, compared: Tensor, scale: float, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(logits, gradients, compared)
        ctx.slope, ctx.temperature = scale / temperature, temperature
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, gradients, compared = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is slope * (softmax - the past's), which is constant
            share = (masked_filled(logits).float() / ctx.temperature).softmax(dim=1)
            gradients = gradients + (ctx.slope * (share - share.detach())).where(compared[:, None], 0)
            mine = (gradients * gradient).to(logits.dtype)
        else:  # scaled before it is rounded: a scaler's factor is what keeps it in float16's range
            mine = torch.mul(gradients, gradient, out=torch.empty_like(gradients, dtype=logits.dtype))
        return mine, None, None, None, None, None


def _fits(history: History, logits: Tensor) -> bool:
    """Whether the kernel knows this form of history, and it is where the logits are."""
    codec, store = history.codec, history.store
    return (
        logits.device.type in KERNEL_DEVICES
        and ((type(codec) is Dense and codec.dtype in ROW_DTYPES) or type(codec) is Quantized)
        and history.momentum is None
        and logits.dtype in DTYPES
        and len(logits) > 0
        and store.rows.device == logits.device
        and not store.on_host
        and store.ranks.size == 1
    )


@functools.cache
def _kernel() -> Any:
    """The kernel; None without Triton, which comes with torch for GPUs."""
    try:
        from ._saf_kernel import saf_kernel
    except ImportError:
        return None
    return saf_kernel


def _order(index: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The indices on the device, and which row each position records if samples may occur twice; -1 for none."""
    if index.device == device and device.type != "cpu":  # looking at them would wait
        return index, _recorded(index)
    index = index.to(torch.int64)
    samples = index.tolist()
    if len(set(samples)) == len(samples):
        return move(index, device), None
    both = move(torch.stack([index, _recorded(index)]), device)
    return both[0], both[1]


def _recorded(index: Tensor) -> Tensor:
    """For the first occurrence of each sample the position of its last one, and -1 for the others."""
    first, last = occurrences(index)
    return last.where(first == torch.arange(len(index), device=index.device), -1)


def _launch(
    kernel: Any,
    history: History,
    logits: Tensor,
    samples: Tensor,
    recorded: Tensor | None,
    clock: Tensor,
    gradients: Tensor,
    losses: Tensor,
    compared: Tensor,
    *,
    compare: bool,
    begin: int,
    temperature: float,
    scale: float,
) -> None:
    codec, store = history.codec, history.store
    bits = codec.bits if isinstance(codec, Quantized) else 0
    rows = store.rows.view(codec.dtype) if isinstance(codec, Dense) else store.rows
    block = min(1 << (history.num_classes - 1).bit_length(), BLOCK)
    # Triton launches on the current device, which need not be the logits'.
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        kernel[(len(logits),)](
            logits,
            *logits.stride(),
            rows,
            store.epochs,
            samples,
            samples if recorded is None else recorded,
            clock,
            gradients,
            losses,
            compared,
            history.num_classes,
            history.num_samples,
            rows.shape[2],
            history.lag,
            begin,
            temperature,
            scale,
            _filling(logits.dtype),
            BITS=bits,
            HALF=rows.dtype == torch.float16,
            REPEATED=recorded is not None,
            COMPARE=compare,
            BLOCK=block,
            num_warps=4 if block <= 1024 else 8,
        )


_broken = False


def _works(launch: Callable[[], None]) -> bool:
    """Launches the kernel; if that fails, warns once, and the plain operations run from then on."""
    global _broken
    try:
        launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken = True
        warnings.warn(
            f"SAF's kernel cannot be used here ({_reason(error)}): its plain operations run "
            "instead, which give the same and take longer; with a working Triton it is faster",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )
    return not _broken


def _reason(error: BaseException) -> str:
    """In a line: the first error of a chain. Triton's later ones show where it came from, and so do its first lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('at ') else 0].strip():.200}"


@functools.cache
def _filling(dtype: torch.dtype) -> float:
    """What a masked class gets, as ``dtype`` holds it."""
    return float(torch.tensor(filling(dtype), dtype=dtype, device="cpu"))
