"""The step of a loop with Accelerate: a window of micro-batches, over which both passes are made."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ..._warn import depth_in_package
from ...errors import FlatminWarning, InvalidArgumentError
from ...optim._first_pass import Beginning
from ...optim._second_pass import each_module
from ._checks import check_accelerator, check_loss, check_model, check_no_backward, check_optimizer, check_without_saf


def sharpness_aware(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    *,
    loss: Callable[..., Tensor],
    clip: Callable[[], Any] | None = None,
) -> "Window":
    """Makes the function that takes each micro-batch, and makes a step when ``accelerator`` says that one is due.

    Both passes go over all micro-batches of ``gradient_accumulation_steps``, with the same dropout masks; running
    statistics move in the first pass alone. They are kept until then, and nothing is computed before. The function
    counts with ``accelerator.accumulate``, divides by ``accelerator.backward``, and steps by the prepared optimizer's
    ``step``, so that ``sync_gradients``, prepared schedulers, ``optimizer_step_was_skipped`` and the scaler of
    ``mixed_precision="fp16"`` are as in any loop of Accelerate. It clears the gradients before each pass. Do not call
    it inside ``accelerator.accumulate``. Call ``save_state`` after it has returned a loss.

    Args:
        accelerator: The accelerator; one process, or several with ``DistributedDataParallel``.
        model: What ``accelerator.prepare`` returned for the network.
        optimizer: What it returned for an optimizer of flatmin's, of any method but ESAM.
        loss: Computes the loss of a micro-batch, a mean over its samples, from what the function is called with.
            Called once a micro-batch in each pass; it does not call ``backward``.
        clip: Called before each step, when the gradients are those that the base optimizer is to step with, such as
            ``lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0)``. None (default): only the optimizer's
            ``max_norm`` clips.

    Returns:
        A function of a micro-batch, in any arguments. It returns None until a step is due; then the loss of the first
        pass, the mean over the micro-batches, without gradient.

    Raises:
        InvalidArgumentError: (a ValueError) if something was not prepared, or cannot be used.

    Example:
        >>> import torch, flatmin
        >>> from accelerate import Accelerator
        >>> from flatmin.integrations.accelerate import sharpness_aware
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(4, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, flatmin.SAM(base, rho=0.05))
        >>> step = sharpness_aware(
        ...     accelerator, model, optimizer, loss=lambda x, y: torch.nn.functional.cross_entropy(model(x), y)
        ... )
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> first = step(x, y)
        >>> bool(step(x, y) < first)
        True
    """
    return Window(accelerator, model, optimizer, loss, clip)


class Window:
    """The micro-batches of a step, so far; what `sharpness_aware` returns."""

    def __init__(self, accelerator: Any, model: Any, optimizer: Any, loss: Any, clip: Any) -> None:
        self._accelerator: Any = check_accelerator(accelerator)
        check_model(model, accelerator)
        self._plain = check_optimizer(optimizer, accelerator)
        for name, value in {"loss": loss, "clip": clip}.items():
            if not callable(value) and not (name == "clip" and value is None):
                raise InvalidArgumentError(f"{name} must be a function, got {type(value).__name__}")
        self._model, self._optimizer, self._loss, self._clip = model, optimizer, loss, clip
        if accelerator.scaler is not None:
            self._plain.scaler = accelerator.scaler
        self._batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._counted: int | None = None  # the accelerator's count after the last call; None if it may be any
        self._warned = False
        this = weakref.ref(self)
        handles = [
            accelerator.register_save_state_pre_hook(lambda *_: _told(this, "_warn_of_loss")),
            accelerator.register_load_state_pre_hook(lambda *_: _told(this, "clear")),
        ]
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Takes a micro-batch; makes the step if one is due.

        Returns:
            The loss of the first pass, or None if no step was due.

        Raises:
            InvalidArgumentError: If somebody else has counted a micro-batch, or ``loss`` returns no loss.
        """
        self._check_count()
        with self._accelerator.accumulate(self._model):
            self._counted = self._accelerator.step
            self._batches.append((args, kwargs))
            if not self._accelerator.sync_gradients:
                return None
            batches, self._batches = self._batches, []
            return self._make(batches)

    def clear(self) -> None:
        """Forgets the micro-batches of a step that is not due yet."""
        self._batches, self._counted = [], None

    def _make(self, batches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
        loss: Tensor | None = None
        with closing(self._plain._passes_beside(Beginning(seen=True, inside=True))) as passes:
            for index in passes:
                if index > 0:
                    self._pass(batches)
                    continue
                with nullcontext() if self._plain.max_passes == 1 else each_module(self._look):
                    loss = self._pass(batches)
        if self._clip is not None:
            self._clip()
        self._optimizer.step()
        assert loss is not None
        return loss

    @torch.enable_grad()
    def _pass(self, batches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
        self._plain.zero_grad()
        losses = []
        for number, (args, kwargs) in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self._accelerator.no_sync(self._model):
                value = self._loss(*args, **kwargs)
                if number == 1:
                    check_no_backward(self._plain)
                loss = check_loss(value)
                self._accelerator.backward(loss)
            losses.append(loss.detach().reshape(()))
        return torch.stack(losses).mean()

    def _look(self, module: nn.Module) -> None:
        check_without_saf(self._plain, module)

    def _check_count(self) -> None:
        """Refuses another ``accumulate``, which would make windows of fewer micro-batches."""
        if self._counted is None or self._counted == self._accelerator.step:
            return
        if self._accelerator.gradient_accumulation_steps == 1:
            return
        raise InvalidArgumentError(
            "the accelerator has counted a micro-batch that this function was not given, so that steps would be made "
            "of fewer: call it outside of accelerator.accumulate(), and with a second model or optimizer let each have "
            "an Accelerator with gradient_accumulation_steps=1, and larger batches"
        )

    def _warn_of_loss(self) -> None:
        if self._batches and not self._warned:
            self._warned = True
            warnings.warn(
                f"save_state between two steps leaves out {len(self._batches)} micro-batches of the next one: call it "
                "after the function of sharpness_aware has returned a loss (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )


def _told(this: "weakref.ref[Window]", what: str) -> None:
    window = this()
    if window is not None:
        getattr(window, what)()
