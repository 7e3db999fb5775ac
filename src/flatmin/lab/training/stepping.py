"""One step of a method on a batch: its forward and backward passes, as often as its optimizer asks for them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer

from ...errors import InvalidArgumentError
from ...optim import SharpnessAware
from ..methods import Assembled
from ..problems.checked import logits_of, loss_of
from ..problems.problem import Problem, make_criterion
from ..problems.source import OPTIMIZER, STEP
from ..recipe import Run
from .compiled import said
from .evaluation import autocast
from .progress import StepResult


class Stepping:
    """Makes steps.

    Args:
        run: Recipe, method, hyperparameters and seed.
        problem: What it trains on.
        network: What is called, the network or a wrapper of it.
        method: What the method is made of.
        optimizer: Makes the step: the method's, or with differential privacy Opacus' around the plain one.
        plain: Whether it is the plain optimizer, or around it.
        scaler: Of float16; not enabled in other precisions.
        device: Where the network is.

    Attributes:
        criterion: The mean loss of logits and targets.

    Raises:
        InvalidArgumentError: If the method needs the loss of each sample, and an experiment file gives their mean.
    """

    def __init__(
        self,
        run: Run,
        problem: Problem,
        network: nn.Module,
        method: Assembled,
        optimizer: Optimizer,
        *,
        plain: bool,
        scaler: GradScaler,
        device: torch.device,
    ) -> None:
        if method.chooses and problem.criterion is not None:
            raise InvalidArgumentError(
                f"{run.method} needs the loss of each sample, but the experiment file's criterion() returns their "
                f"mean: leave out {run.method} or the criterion"
            )
        self.criterion = make_criterion(problem, run.settings["smoothing"])
        self._run, self._problem, self._network, self._method = run, problem, network, method
        self._optimizer, self._scaler, self._device = optimizer, scaler, device
        # A registered method's own optimizer may call the closure as often as it likes; under a scaler, which steps
        # without one, only those that know the scaler.
        own = not plain and not scaler.is_enabled()
        self._takes_closure = own or isinstance(optimizer, SharpnessAware)

    def step(self, index: Tensor, x: Tensor, y: Tensor, *, weight: float = 1.0) -> StepResult:
        """Makes one step.

        Args:
            index: Index of each sample in the data set, int64, shape (B,), on the CPU.
            x: Inputs, on the device.
            y: Class indices, int64, shape (B,), on the device.
            weight: Weight of the mean over this rank's samples, see `RankBatches.weight`.
        """
        losses: list[tuple[Tensor, Tensor]] = []
        recipe, method = self._run.recipe, self._method

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            with autocast(recipe, self._device):
                if method.prepare is not None:
                    method.prepare(x)
                logits = logits_of(self._problem, self._network, x)
                vanilla = loss_of(self._problem, self.criterion, logits, y) if len(y) else logits.sum()
                loss = vanilla if method.penalty is None else vanilla + method.penalty(logits, y, index, x)
            scaled = self._scaler.scale(loss if weight == 1 else loss * weight)
            scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            losses.append((loss.detach().float(), vanilla.detach().float()))
            return loss

        def choosing(keep: Any) -> Tensor:
            with autocast(recipe, self._device):
                logits = logits_of(self._problem, self._network, x[keep])
                smoothing = self._run.settings["smoothing"]
                each = F.cross_entropy(logits, y[keep], reduction="none", label_smoothing=smoothing)
            mean = each.detach().float().mean()
            losses.append((mean, mean))
            return each if weight == 1 else each * weight

        calling = self._problem.source.calling
        with said(recipe), calling(STEP):
            if self._takes_closure:
                optimizer: Any = self._optimizer  # one that chooses samples takes another closure than torch's
                optimizer.step(choosing if method.chooses else closure)
            else:  # which a scaler steps without a closure
                closure()
                with calling(OPTIMIZER):
                    self._scaler.step(self._optimizer)
            self._scaler.update()
        return StepResult(*losses[0], calls=len(losses))
