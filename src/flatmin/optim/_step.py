"""The passes of one step, from which each method is put together."""

import operator
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .._passes import within
from .._rng import CPU, Everywhere, replayed
from ..errors import InvalidArgumentError
from ._foreach import global_norm, length, scale_, scaled_norm
from ._perturbation import Scaling, moved
from ._second_pass import agreed, frozen_buffers, local_gradients
from ._surroundings import Buffers, OtherGradients, Surroundings
from .schedules import Schedule, decided

Passes = Generator[None, None, None]  # yields wherever a pass is due; whoever goes over it makes the pass then


class NotFiniteError(Exception):
    """A gradient of a step is infinite or not a number; the message says which. Never reaches the user."""


class LossScale:
    """The loss scale of one step in float16, by the public functions of torch's ``GradScaler`` alone.

    The scaler is told of one pass a step, which is all that it allows.

    Args:
        scaler: The scaler; one that is not enabled scales by 1.
        optimizer: Whose step it is.
        removed: Whether the gradients are divided by the scale already, and the scaler knows whether they are finite.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer, *, removed: bool = False) -> None:
        self._scaler, self._optimizer, self._removed = scaler, optimizer, removed
        self._factor = 1.0 if removed else 0.0  # not known before the first backward pass, which may choose it

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self._scaler.is_enabled()

    def factor(self) -> float:
        """What the losses of this step are multiplied with. Waits for the device, once a step."""
        if not self._factor:
            self._factor = self._scaler.get_scale()
        return self._factor

    def remove(self, gradients: list[Tensor], *, last: bool) -> None:
        """Divides by the scale: of the last pass's gradients the scaler does it, and notes that they are finite."""
        if self._removed:
            return
        if last:
            self._scaler.unscale_(self._optimizer)
        elif self.enabled:
            scale_(gradients, 1 / self.factor())

    def overflowed(self, gradients: list[Tensor]) -> None:
        """Has the scaler note that a pass was not finite, on this rank too where it was so on another alone."""
        if self.enabled and not self._removed:
            for gradient in gradients:
                gradient.fill_(float("inf"))
            self._scaler.unscale_(self._optimizer)


@dataclass
class Step:
    """One step: what it is made with, and what its last pass has found.

    A two-pass method goes over `first_pass`, and where `second_runs` then, over `second_pass`. A one-pass method goes
    over `only_pass`. Gradients are unscaled after each.

    Attributes:
        name: The method's, for errors.
        closure: Makes a pass; None if whoever goes over the passes makes them.
        index: How many steps were made before.
        rho: Length of the perturbation.
        groups: The parameter groups.
        subset: The parameters that may be perturbed; None for all.
        scaling: What makes a perturbation of a direction.
        when: In which steps the second pass runs.
        surroundings: The network and other optimizers.
        local: Whether to perturb along the gradient of this rank's batch.
        replay: Whether the second pass draws the random numbers of the first.
        max_norm: Norm that the gradient to step with has at most; None for any.
        scale: The scale of the losses.
        check: Looks at the weights when they are moved, as `moved` has it; None if that was done.
        second_runs: Whether the second pass runs; None until the gradient of the first has decided.
        parameters: Those with a gradient in the last pass.
        gradients: Theirs.
        norm: The gradients' norm.
        first_norm: The norm of those of the first pass.
        loss: What the closure returned in its first call.
        before: The buffers before the step, which a step that is dropped puts back; None until the first pass.
        failed: Which pass was not finite, so that the step is dropped; empty if none.
    """

    name: str
    closure: Callable[..., Any] | None
    index: int
    rho: float
    groups: list[dict[str, Any]]
    subset: set[Tensor] | None
    scaling: Scaling
    when: Schedule
    surroundings: Surroundings
    local: bool
    replay: bool
    max_norm: float | None
    scale: LossScale
    check: Callable[[list[Tensor], list[Tensor], list[Tensor]], None] | None
    second_runs: bool | None = field(init=False)
    parameters: list[Tensor] = field(init=False, default_factory=list)
    gradients: list[Tensor] = field(init=False, default_factory=list)
    norm: float = field(init=False, default=0.0)
    first_norm: float = field(init=False, default=0.0)
    loss: Any = field(init=False, default=None)
    before: Buffers | None = field(init=False, default=None)
    failed: str = field(init=False, default="")
    _ranks: list[ProcessGroup] = field(init=False, default_factory=list)
    _random: Everywhere | None = field(init=False, default=None)
    _token: object = field(init=False, default_factory=object)  # of the step, for losses that count their calls

    def __post_init__(self) -> None:
        answer = self.when.before(self.index) if self.rho > 0 else False
        self.second_runs = None if answer is None else bool(answer)

    def first_pass(self) -> Passes:
        """Takes the gradient at the weights, and decides whether the second pass runs."""
        possible = self.second_runs is not False
        if possible and self.replay:
            self._random = Everywhere.on({CPU, *(parameter.device for parameter in self._every())})
        self.remember()
        others = self.surroundings.other_gradients(self._every()) if possible else OtherGradients(())
        try:
            # Where the gradient decides, it has to be that of the whole batch, or ranks would decide differently.
            wanted = self.local and self.second_runs is True
            with (
                within(self._token, second=False),
                local_gradients(self.surroundings.model, wanted=wanted) as self._ranks,
            ):
                yield
            self._collect("first")
        except NotFiniteError:
            others.drop()
            raise
        except BaseException:
            others.keep()
            raise
        self.first_norm = self.norm
        if self.second_runs is None:
            self.second_runs = decided(self.when.after(self.index, self.norm), self.index)
        (others.drop if self.second_runs else others.keep)()
        self.scale.remove(self.gradients, last=not self.second_runs)

    def second_pass(
        self,
        parameters: list[Tensor] | None = None,
        directions: list[Tensor] | None = None,
        *,
        rho: float | None = None,
        eps: float = 1e-12,
    ) -> Passes:
        """Takes the gradient at weights moved up the slope, or along ``directions``; buffers stand still.

        The first gradients are cleared, and the list ``directions`` is emptied, so that the pass can have their memory,
        and a closure that does not call ``backward`` is noticed.

        Args:
            parameters: Those to perturb; by default all that may be.
            directions: A tensor for each of ``parameters``; by default their gradients.
            rho: Length, if it is not the step's own.
            eps: Added to the norm that the directions are divided by.
        """
        norm = None
        if parameters is None or directions is None:
            parameters, directions = self.to_perturb()
            norm = self.norm if directions is self.gradients else None
        rho = self.rho if rho is None else rho
        with (
            moved(parameters, directions, self.scaling, rho=rho, eps=eps, norm=norm, check=self.check),
            frozen_buffers(self.surroundings, self._every()),
            replayed(self._random),
            within(self._token, second=True),
        ):
            self.gradients.clear()
            for parameter in self._every():
                parameter.grad = None
            yield
        self._collect("second")
        self.scale.remove(self.gradients, last=True)

    def only_pass(self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0) -> Passes:
        """Takes the gradient once, at weights moved along ``directions``; at the weights where there are none."""
        self.remember()
        with self.along(parameters, directions, sign=sign):
            yield
        self._collect("only")
        self.scale.remove(self.gradients, last=True)

    def along(
        self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0, norm: float | None = None
    ) -> AbstractContextManager[list[Tensor]]:
        """Inside, the weights are moved along ``directions``, whose norm may be known, if there are any; `moved`."""
        if self.rho == 0 or not parameters:
            return nullcontext([])
        check, self.check = self.check, None
        return moved(parameters, directions, self.scaling, rho=sign * self.rho, eps=1e-12, norm=norm, check=check)

    def remember(self) -> None:
        """Copies the buffers, if it is not done."""
        if self.before is None:
            self.before = Buffers(self.surroundings.modules(self._every()))

    def candidates(self) -> list[Tensor]:
        """All parameters that may be perturbed, with a gradient or without; not those that are frozen now."""
        trained = [parameter for parameter in self._every() if parameter.requires_grad]
        return [parameter for parameter in trained if self.subset is None or parameter in self.subset]

    def to_perturb(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those parameters with a gradient that may be perturbed, and their gradients."""
        if self.subset is None:
            return self.parameters, self.gradients
        pairs = [pair for pair in zip(self.parameters, self.gradients, strict=True) if pair[0] in self.subset]
        if not pairs:
            raise InvalidArgumentError(
                f"none of the parameters that {self.name} was given to perturb has a gradient; "
                "give parameters= some that are trained"
            )
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def beside_second(self, parameters: list[Tensor], first: list[Tensor]) -> tuple[list[Tensor], float]:
        """The ``first`` gradients, of ``parameters``, of those with a second one, and their norm."""
        found = aligned(self.parameters, parameters, first)
        return found, self.first_norm if found is first else length(found)

    def clip(self) -> None:
        """Shortens the gradient to step with to ``max_norm``, as ``clip_grad_norm_`` does."""
        if self.max_norm is not None:
            factor = self.max_norm / (length(self.gradients) + 1e-6)
            if factor < 1:
                scale_(self.gradients, factor)

    def _every(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def _collect(self, which: str) -> None:
        """Finds the gradients that a pass has left, and their norm, on which all ranks agree if it is not finite."""
        found = [(parameter, gradient) for parameter in self._every() if (gradient := parameter.grad) is not None]
        self.parameters, self.gradients = [pair[0] for pair in found], [pair[1] for pair in found]
        if not self.gradients:
            raise InvalidArgumentError("the closure left no gradient: it must call loss.backward()")
        if {gradient.layout for gradient in self.gradients} != {torch.strided}:
            raise InvalidArgumentError(f"{self.name} needs dense gradients; create the embedding with sparse=False")
        norm = agreed(global_norm(self.gradients), self._ranks)
        if not norm < float("inf"):  # the squares alone, perhaps, on one rank, perhaps
            norm = agreed(scaled_norm(self.gradients), self._ranks)
        self.norm = norm / self.scale.factor()
        if not abs(self.norm) < float("inf"):
            raise NotFiniteError(which)


def aligned(parameters: list[Tensor], others: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Of ``tensors``, which belong to ``others``, those of ``parameters``; zeros for one that is not among them."""
    if len(parameters) == len(others) and all(map(operator.is_, parameters, others)):
        return tensors
    known = dict(zip(others, tensors, strict=True))
    return [known[p] if p in known else torch.zeros_like(p) for p in parameters]
