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
from ._clipping import Clipping
from ._dropping import Dropping
from ._first_pass import Beginning, Beginnings
from ._foreach import Scalar, global_norm, length, scaled_norm, shorten_, stays
from ._mark import Mark, Seen
from ._perturbation import Scaling, moved
from ._scale import LossScale, noted_scaling
from ._second_pass import agreed, frozen_buffers, local_gradients
from ._surroundings import Buffers, OtherGradients, Surroundings
from .schedules import Schedule, decided

Passes = Generator[None, None, None]  # yields wherever a pass is due; whoever goes over it makes the pass then


ADDS = (
    "the closure adds to gradients that were there before it, of other micro-batches or of a backward() before the "
    "step, which the second pass would not have: let it begin with optimizer.zero_grad() and go over all micro-batches"
)


class NotFiniteError(Exception):
    """A gradient of a step is infinite or not a number; the message says which. Never reaches the user."""


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
        beginnings: Knows how the next step begins, where its first pass is in the user's loop.
        begun: How this one began, if its first pass was over before the optimizer knew; None if it knows the passes.
        seen: The gradient of the last step, if this optimizer has made it.
        local: Whether to perturb along the gradient of this rank's batch.
        replay: Whether the second pass draws the random numbers of the first.
        max_norm: Norm that the gradient to step with has at most; None for any.
        scale: The scale of the losses.
        base: The base optimizer.
        dropping: Makes its step, and knows whether that can be dropped on the device.
        clipping: Notices that a pass clips.
        check: Looks at the weights when they are moved, as `moved` has it; None if that was done.
        second_runs: Whether the second pass runs; None until the gradient of the first has decided.
        parameters: Those with a gradient in the last pass.
        gradients: Theirs.
        norm: The gradients' norm; on their device where the host need not know it.
        first_norm: The norm of those of the first pass.
        loss: What the closure returned in its first call.
        before: The buffers before the step, which a step that is dropped puts back; None until the first pass.
        failed: Which pass was not finite, so that the step is dropped; empty if none.
        bad: Whether one was not, where the host does not know: on the device.
        left: Whether one has added to what there was before, likewise.
        decides: Whether the schedule looks at the norm.
        scaled_by: Scalers that the optimizer was not given, which have scaled a loss in a pass.
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
    beginnings: Beginnings
    begun: Beginning | None
    seen: Seen | None
    local: bool
    replay: bool
    max_norm: float | None
    scale: LossScale
    base: Optimizer
    dropping: Dropping
    clipping: Clipping
    check: Callable[[list[Tensor], list[Tensor], list[Tensor]], None] | None
    second_runs: bool | None = field(init=False)
    parameters: list[Tensor] = field(init=False, default_factory=list)
    gradients: list[Tensor] = field(init=False, default_factory=list)
    norm: Scalar = field(init=False, default=0.0)
    first_norm: Scalar = field(init=False, default=0.0)
    loss: Any = field(init=False, default=None)
    before: Buffers | None = field(init=False, default=None)
    failed: str = field(init=False, default="")
    bad: Tensor | None = field(init=False, default=None)
    left: Tensor | None = field(init=False, default=None)
    decides: bool = field(init=False)
    scaled_by: list[GradScaler] = field(init=False, default_factory=list)
    _others: OtherGradients | None = field(init=False, default=None)  # those set aside until the second pass is over
    _ranks: list[ProcessGroup] = field(init=False, default_factory=list)
    _random: Everywhere | None = field(init=False, default=None)
    _token: object = field(init=False, default_factory=object)  # of the step, for losses that count their calls

    def __post_init__(self) -> None:
        answer = self.when.before(self.index) if self.rho > 0 else False
        self.second_runs = None if answer is None else bool(answer)
        self.decides = answer is None or type(self.when).observe is not Schedule.observe
        if self.begun is not None:
            self.before = self.begun.buffers

    def first_pass(self) -> Passes:
        """Takes the gradient at the weights, and decides whether the second pass runs."""
        possible = self.second_runs is not False
        if possible and self.replay:
            known = self.begun.random[:1] if self.begun is not None else []
            self._random = next(iter(known), None) or self._random_now()
        self.remember()
        others = self.surroundings.other_gradients(self.every()) if possible else OtherGradients(())
        mark = Mark(self.every() if self.begun is None else (), self.seen)
        try:
            # Where the gradient decides, it has to be that of the whole batch, or ranks would decide differently.
            wanted = self.local and self.second_runs is True
            with (
                within(self._token, second=False),
                self.clipping.watched(self, "first"),
                self._scaling(),
                local_gradients(self.surroundings.model, wanted=wanted) as self._ranks,
            ):
                yield
            mark.remove_if_untouched()
            self._collect("first", last=self.second_runs is False)
            if self.bad is not None:
                self.left = mark.is_left_on_device(self.gradients)
        except NotFiniteError:
            others.drop()
            if mark.is_left(self.gradients):
                raise InvalidArgumentError(ADDS) from None
            raise
        except BaseException:
            others.keep()
            raise
        finally:
            mark.remove()
        self.first_norm = self.norm
        if self.second_runs is None:
            self.second_runs = decided(self.when.after(self.index, float(self.norm)), self.index)
        if not self.second_runs:
            others.keep()
        elif self.begun is None or self.begun.inside:
            others.drop()
        else:  # what was set aside has the first gradient in it
            self._others = others
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
        self.scale.begin_second()
        with (
            self._others or nullcontext(),
            moved(parameters, directions, self.scaling, rho=rho, eps=eps, norm=norm, check=self.check),
            frozen_buffers(self.surroundings, self.every()),
            replayed(self._random),
            nullcontext() if self.begun is None else self.beginnings.replayed(self.begun),
            within(self._token, second=True),
            self.clipping.watched(self, "second"),
            self._scaling(),
        ):
            self.gradients.clear()
            for parameter in self.every():
                parameter.grad = None
            yield
        self._collect("second", last=True)
        self.scale.remove(self.gradients, last=True)

    def only_pass(self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0) -> Passes:
        """Takes the gradient once, at weights moved along ``directions``; at the weights where there are none."""
        self.remember()
        with self.along(parameters, directions, sign=sign), self.clipping.watched(self, "only"), self._scaling():
            yield
        self._collect("only", last=True)
        self.scale.remove(self.gradients, last=True)

    def along(
        self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0, norm: Scalar | None = None
    ) -> AbstractContextManager[list[Tensor]]:
        """Inside, the weights are moved along ``directions``, whose norm may be known, if there are any; `moved`."""
        if self.rho == 0 or not parameters:
            return nullcontext([])
        check, self.check = self.check, None
        return moved(parameters, directions, self.scaling, rho=sign * self.rho, eps=1e-12, norm=norm, check=check)

    def remember(self) -> None:
        """Copies the buffers, if it is not done."""
        if self.before is None:
            self.before = Buffers(self.surroundings.modules(self.every()))

    def candidates(self) -> list[Tensor]:
        """All parameters that may be perturbed, with a gradient or without; not those that are frozen now."""
        trained = [parameter for parameter in self.every() if parameter.requires_grad]
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

    def beside_second(self, parameters: list[Tensor], first: list[Tensor]) -> tuple[list[Tensor], Scalar]:
        """The ``first`` gradients, of ``parameters``, of those with a second one, and their norm."""
        found = aligned(self.parameters, parameters, first)
        return found, self.first_norm if found is first else length(found)

    def fail(self, which: str) -> None:
        """The gradient of a pass is not finite: the buffers are as they were, and the scaler is told."""
        self.failed = which
        self.scale.overflowed(self.gradients)
        if self.before is not None:
            self.before.restore()

    def finish(self) -> None:
        """All passes are made: the gradient to step with is as the loop expects it."""
        self.scale.put_back(self.gradients)
        if self.bad is not None and self.before is not None:
            self.before.restore(self.bad)

    def settle(self) -> None:
        """Unscales the gradient to step with, if that is not done, and shortens it to ``max_norm`` at most."""
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        if gradients:
            self.scale.settle()
        elif not self.failed:
            raise InvalidArgumentError(
                f"the gradient that {self.name} is to step with was cleared: call zero_grad() after step(), or before "
                "a backward pass"
            )
        if self.max_norm is not None and not self.failed:
            shorten_(gradients, self.max_norm)

    def _scaling(self) -> AbstractContextManager[None]:
        """Inside, a pass is made, and scalers that the optimizer was not given are noted as they scale a loss."""
        return noted_scaling([] if self.scale.enabled else self.surroundings.scalers(self.every()), self.scaled_by)

    def _random_now(self) -> Everywhere:
        return Everywhere.on({CPU, *(parameter.device for parameter in self.every())})

    def every(self) -> list[Tensor]:
        """All parameters."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def _collect(self, which: str, *, last: bool) -> None:
        """Finds the gradients that a pass has left, and their norm, on which all ranks agree if it is not finite.

        The host waits for the norm where it has to know: if a schedule decides by it, or a scaler, or if it is the
        ``last`` pass, and the base optimizer's step cannot be dropped on the device.
        """
        if which != "second" and self.before is not None:
            self.before.find_moving()
        found = [(parameter, gradient) for parameter in self.every() if (gradient := parameter.grad) is not None]
        self.parameters, self.gradients = [pair[0] for pair in found], [pair[1] for pair in found]
        if not self.gradients:
            raise InvalidArgumentError(
                "the closure left no gradient: it must call loss.backward()"
                if self.begun is None
                else f"the {which} pass left no gradient: call backward() before perturb() and again before restore()"
            )
        if {gradient.layout for gradient in self.gradients} != {torch.strided}:
            raise InvalidArgumentError(f"{self.name} needs dense gradients; create the embedding with sparse=False")
        self.scale.look()
        if stays(self.gradients):
            self._note(global_norm(self.gradients, torch.float64), which, last=last)
            return
        norm = float(agreed(global_norm(self.gradients), self._ranks))
        if not norm < float("inf"):  # the squares alone, perhaps, on one rank, perhaps
            norm = float(agreed(scaled_norm(self.gradients), self._ranks))
        self.norm = norm / self.scale.factor()
        if not abs(self.norm) < float("inf"):
            raise NotFiniteError(which)

    def _note(self, norm: Tensor, which: str, *, last: bool) -> None:
        """Notes a norm on its device, and reads whether it is finite where the host has to know."""
        self.norm = agreed(norm, self._ranks) / self.scale.factor()
        bad, before = self.norm.isfinite().logical_not(), self.bad
        self.bad = bad if before is None else bad | before
        late = last and not self.dropping.can(self.base, self.parameters)
        if not (late or self.decides or self.scale.enabled):
            return
        if bool(self.bad):
            if self.left is not None and bool(self.left):
                raise InvalidArgumentError(ADDS)
            raise NotFiniteError(which if before is None or not bool(before) else "first")
        self.bad = None


def aligned(parameters: list[Tensor], others: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Of ``tensors``, which belong to ``others``, those of ``parameters``; zeros for one that is not among them."""
    if len(parameters) == len(others) and all(map(operator.is_, parameters, others)):
        return tensors
    known = dict(zip(others, tensors, strict=True))
    return [known[p] if p in known else torch.zeros_like(p) for p in parameters]
