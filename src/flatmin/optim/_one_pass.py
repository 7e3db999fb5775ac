"""What methods share whose step is one forward-backward pass at weights that are moved before it."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._displaced import Displaced
from ._far_statistics import FarStatistics
from ._foreach import Scalar, length
from ._network_hooks import Attached, unattended
from ._perturbation import Rho, Scaling, unit
from ._scale import LossScale
from ._step import Passes, Step
from ._trainers import check_closure, check_loss


class OnePass(SharpnessAware):
    """A method that knows where to move before the pass, so that any loop can make it.

    The direction does not change between two steps: all passes in between, such as those over micro-batches, are made
    at the same point, whether the weights stay there or are put back and moved again.
    """

    max_passes = 1
    displaced: Displaced
    _begun: Step | None  # of which the loop makes the passes
    _norm: Scalar | None  # of its direction
    _attached: Attached | None
    _far: FarStatistics
    _without_closure = SharpnessAware._without_closure + (
        "; or give it the network as model=, for loops that call loss.backward() and then step()"
    )

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho,
        parameters: Iterable[Tensor] | None,
        scaling: Scaling | None,
        scaler: GradScaler | None,
        max_norm: float | None,
        model: nn.Module | None,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            parameters=parameters,
            scaling=scaling,
            scaler=scaler,
            max_norm=max_norm,
            model=model,
        )
        self._attach()

    @abstractmethod
    def _direction(self, step: Step) -> tuple[list[Tensor], list[Tensor], float]:
        """The parameters to move, a direction for each, and the sign; the same until the next step."""

    def _made(self, step: Step) -> None:  # most remember nothing
        """Called when the step's gradient is known, before it is clipped."""

    def perturb(self) -> bool:
        """Moves the weights, before the forward pass; they stay moved until `restore` or `step`.

        With ``model=`` there is no need to: every training forward does.

        Returns:
            Whether the forward and backward pass is to be made now: not if it was, by a loop of which the network tells
            with ``model=``. No second one is wanted.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.S2SAM(torch.optim.SGD([weight], lr=0.1))
            >>> for _ in range(2):
            ...     optimizer.zero_grad()
            ...     _ = optimizer.perturb()
            ...     weight.square().sum().backward()
            ...     optimizer.step()
        """
        self._check_idle("another pass")
        made = self._begun is not None and self._accumulating()
        self.move()
        if self._attached is not None:
            self._attached.held = True
        return not made

    def restore(self) -> None:
        """Puts the weights back, bit-identical, after the backward pass; `step` does it too."""
        self._put_back("restore() was called")

    def abandon(self) -> None:
        """Gives up the pass that was begun: the weights are as before, bit-identical."""
        self._put_back("abandon() was called")
        self._begun = None
        super().abandon()

    @torch.no_grad()
    def move(self) -> None:
        """Moves the weights for a pass of the step that is to come; nothing while they are moved."""
        if self.displaced.clean:
            return
        if self._begun is None or not self._accumulating():  # or what there was has been cleared
            self._begun, self._norm = self._begin(None), None
            self._begun.remember()
        parameters, directions, sign = self._direction(self._begun)
        if self._begun.rho > 0 and parameters:
            if self._norm is None and self._scaling is unit:  # waits for the device, once a step
                self._norm = length(directions)
            self.displaced.move(parameters, self._begun.along(parameters, directions, sign=sign, norm=self._norm))

    def owned(self) -> set[Tensor]:
        """The parameters of all groups."""
        return {parameter for group in self.param_groups for parameter in group["params"]}

    def _gradient(self, step: Step) -> Passes:
        with unattended():
            if step is self._begun:  # the pass was made, by the loop
                yield from step.only_pass([], [])
            else:
                begun, self._begun = self._begun, None
                self._put_back()
                if begun is not None and self._accumulating():  # the closure adds to what the loop has begun
                    step.before = begun.before
                parameters, directions, sign = self._direction(step)
                yield from step.only_pass(parameters, directions, sign=sign)
        if self._scaling is unit:
            self._far.step_made(step.rho)
        self._made(step)

    def _make_passes(self, closure: Callable[..., Any]) -> Step:
        seen = self._begun is not None
        if not seen:
            check_closure(self, closure)

        def watched() -> Any:
            untouched = _untouched(self.owned())
            loss = closure()
            check_loss(self, closure, loss)
            if untouched() and not seen:
                raise InvalidArgumentError(
                    f"the closure of {type(self).__name__}.step left the gradients as they were, so that they are not "
                    f"those at the perturbed weights: {self._closure}; {self._way_out()}"
                )
            return loss

        return super()._make_passes(watched)

    def _step_without_closure(self) -> Step:
        if self._progress.ready is not None:  # by a loop over passes
            return super()._step_without_closure()
        self._check_idle("another step")
        step = self._begun
        if step is None and self._attached is None:
            return super()._step_without_closure()
        name = type(self).__name__
        if step is None:
            raise InvalidArgumentError(
                f"{name} has seen no forward pass since the last step, so that the gradients are not those at the "
                f"perturbed weights; {self._way_out()}"
            )
        self._put_back()
        if not self._accumulating():
            raise InvalidArgumentError(f"{name} finds no gradient: call loss.backward() before step()")
        self._unscale()
        step.scale = LossScale(self.scaler, self, outside=True)
        with self._progress.begun(step, self._gradient(step)):
            while self._progress.advance(step):  # the pass was made
                pass
        self._after_passes(step)
        self._begun = None
        return step

    def _way_out(self) -> str:
        if self._attached is None:
            return f"or make it {type(self).__name__}(base, model=model), for loops that call backward() before step()"
        return (
            "model= is to be the module that the loop calls, in training mode (no copy, no part of it, no scripted "
            "one), and of several optimizers of the same parameters the last one made counts; or call perturb() before "
            "the forward pass"
        )

    def _unscale(self) -> None:
        """Has the scaler divide the gradients by the scale, if the loop has not."""
        try:
            self.scaler.unscale_(self)
        except RuntimeError as error:
            if "already" not in str(error):
                raise

    def _accumulating(self) -> bool:
        return any(parameter.grad is not None for group in self.param_groups for parameter in group["params"])

    def _put_back(self, because: str = "") -> None:
        if self._attached is not None:
            self._attached.end(because)
        self.displaced.restore()

    def _attach(self) -> None:
        self.displaced = Displaced()
        self._begun, self._norm, self._far = None, None, FarStatistics(type(self).__name__)
        model = self._surroundings.model
        self._attached = None if model is None else Attached(model, self, self._far.forward)

    def _load(self, base: dict[str, Any], own: dict[str, Any]) -> None:
        self._check_idle("load_state_dict")
        self._put_back("the optimizer's state was loaded")
        self._begun = None
        super()._load(base, own)

    def __getstate__(self) -> dict[str, Any]:
        self._put_back("the optimizer was copied")
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THIS_OBJECT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()


_OF_THIS_OBJECT = ("displaced", "_begun", "_norm", "_attached", "_far")


def _untouched(parameters: Iterable[Tensor]) -> Callable[[], bool]:
    """Notes the gradients that there are; the function says whether all are there still, and none was written to."""
    found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not found:
        return lambda: False
    # Objects may get the place of those that are gone, so that one is an object that nobody else has, not kept alive.
    one = found[0][0]
    one.grad = found[0][1].detach()
    mark = TensorWeakRef(one.grad)
    notes = [(parameter, gradient._version) for parameter, gradient in found]
    found.clear()

    def untouched() -> bool:
        same = one.grad is not None and one.grad is mark()
        return same and all(p.grad is not None and p.grad._version == version for p, version in notes)

    return untouched
