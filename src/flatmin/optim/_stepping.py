"""The ways to make a step: with a closure, in a loop over the passes, or by calls between a loop's own passes."""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._distributed import size
from .._privacy import check_not_trained_privately
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError, NonFiniteGradientWarning
from ._beside import Beside
from ._clipping import Clipping
from ._dropping import Dropping
from ._first_pass import Beginning, Beginnings
from ._mark import Seen
from ._memory import Memory
from ._others import note_thread
from ._perturbation import forget_computed
from ._progress import ORDER, Progress
from ._scale import has_unscaled
from ._step import ADDS, Passes, Step
from ._surroundings import Buffers, Surroundings
from ._trainers import check_closure, check_loss
from .schedules import Schedule


class Stepping(ABC):
    """How a step is made: `Progress` goes over the passes that a method's ``_gradient`` yields, whoever makes them.

    A part of `SharpnessAware`, which makes what is declared here.
    """

    max_passes: ClassVar[int]
    base_optimizer: Optimizer
    scaler: GradScaler
    norm: str
    _dropped: bool  # whether the last step was, as far as the host knows
    _mixes_steps: ClassVar[bool] = False  # whether the gradients of different steps are added up
    _uses_first: ClassVar[bool] = False  # whether more of the first gradient matters than its direction
    _uses_both: ClassVar[bool] = False  # whether the gradient to step with is made of both
    _closure: ClassVar[str]  # for errors
    _without_closure: ClassVar[str]
    _steps: int  # that were made
    _memory: Memory
    _when: Schedule
    _replay: bool
    _surroundings: Surroundings
    _faults: list[FlatminWarning]  # of the perturbation, to be warned of
    _skipped: int  # steps that were dropped
    _dropping: Dropping
    _drop_warned = False
    _unmade_warned = False
    _scaled_warned = False

    @abstractmethod
    def _gradient(self, step: Step) -> Passes:
        """Yields where a pass is due, and leaves the gradient that the base optimizer is to step with."""

    @abstractmethod
    def _begin(self, closure: Callable[..., Any] | None, begun: Beginning | None = None) -> Step:
        """A new step, of which nothing is done, or with ``begun`` the first pass."""

    @abstractmethod
    def _scaler_of_loop(self) -> GradScaler | None:
        """A scaler by which the loop has just unscaled the gradients, which the optimizer was not given."""

    _seen: Seen | None  # the gradient of the last step

    def _set_up(self) -> None:
        """Makes what belongs to this object, and not to a copy of it."""
        note_thread(cast(Optimizer, self), self.base_optimizer)
        self._progress, self._seen, self._dropping = Progress(), None, Dropping()
        self._any_made = False  # whether a step was, of this object: a resumed run may have forgotten the scaler
        self._beside = Beside(type(self).__name__)
        self._clipping = Clipping(type(self).__name__, first=self._uses_first, both=self._uses_both)
        known = self._surroundings.model if self.max_passes == 2 else None
        self._beginnings = Beginnings(known, replay=self._replay)

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss, as torch's
                own optimizers expect it. Called twice; once by one-pass methods, in steps without a second pass, and
                where the first gradient is not finite. None: the step that `perturb` and `restore` have prepared is
                made.

        Returns:
            The loss of the first call; of two-pass methods at the unperturbed weights. None without a closure.

        Raises:
            InvalidArgumentError: If there is no closure and nothing was prepared, or it leaves no gradient.
            Exception: Whatever the closure raises; the weights are then as they were.
        """
        check_not_trained_privately(type(self).__name__, self)
        if closure is not None and self._progress.prepared:
            self._run_beside(closure)
            closure = None
        step = self._step_without_closure() if closure is None else self._make_passes(closure)
        if closure is None:
            self._warn_of_scaled(step)
        step.settle()
        self._settle(stacklevel=5)  # of the step before
        faults, self._faults = self._faults, []
        for fault in faults:
            warnings.warn(fault, stacklevel=depth_in_package())
        if step.failed:
            if not step.scale.enabled:
                self._warn_of_dropped(f"the {step.failed} gradient of a", stacklevel=5)
        else:
            self._dropping.step(self.base_optimizer, step.parameters, step.bad, step.left)
            forget_computed()  # of an autocast around several steps
            self._memory.commit(step.bad)
            if step.decides:
                self._when.observe(self._steps, float(step.first_norm))
            self._steps += 1
        self._any_made = True
        self._clipping.forget()
        self._seen = None if step.begun is not None or step.failed else Seen(step.parameters)
        return step.loss

    @property
    def skipped_steps(self) -> int:
        """How many steps were dropped, since a gradient was not finite. Waits for the last step, if that is needed."""
        self._settle(stacklevel=3)
        return self._skipped

    @property
    def step_dropped(self) -> bool:
        """Whether the last step was dropped. Waits for it, if that is needed."""
        self._dropped = self._settle(stacklevel=3) or self._dropped
        return self._dropped

    def _settle(self, *, stacklevel: int) -> bool:
        """Learns what became of the last step, if the host did not wait for it; returns whether it was dropped."""
        found = self._dropping.settle()
        if found is None or not found[0]:
            return False
        self._steps -= 1
        self._skipped += 1
        if found[1]:
            raise InvalidArgumentError(f"{ADDS} (found one step later; that step was dropped)")
        self._warn_of_dropped("a gradient of the last", stacklevel=stacklevel + 1)
        return True

    def _warn_of_dropped(self, which: str, *, stacklevel: int) -> None:
        if not self._drop_warned:
            self._drop_warned = True
            warnings.warn(
                f"{which} {type(self).__name__} step is not finite: the step was dropped "
                "and the weights are as they were (warned once; skipped_steps counts them)",
                NonFiniteGradientWarning,
                stacklevel=stacklevel,
            )

    def perturb(self) -> bool:
        """Moves the weights to where the second gradient is to be taken, after the first backward pass.

        For loops that somebody else owns, of several micro-batches a pass perhaps, who may unscale, clip and call
        ``scaler.step(optimizer)`` in between. The order is ``backward(); perturb(); backward(); restore(); step()``,
        and where this returns False, ``backward(); perturb(); step()``. Own loops should prefer `passes`, and `step`
        with a closure, which see the first pass; here it is over before the optimizer knows of it. With ``model=`` it
        is seen nevertheless. Without, dropout takes other masks in the second, and a step that is dropped puts
        buffers back to where they were after the step before, which the first of all cannot.

        Gradients are cleared for the second pass, also those of what other optimizers train, and what the second pass
        does not reach of these is put back.

        With a ``GradScaler`` of the loop's, give it as ``scaler=``, and scale the loss in both passes. The loop may
        unscale before `perturb`, before `restore`, and before `step`, or leave it to ``scaler.step(optimizer)``.

        Returns:
            Whether a second backward pass is wanted, and `restore` after it. Where not, because of ``when``, or since
            a gradient is known not to be finite, ``.grad`` is what the base optimizer is to step with. On an
            accelerator the host does not know, and the second pass is made.

        Raises:
            InvalidArgumentError: If there is no gradient, a step is under way already, or, on several processes, if
                ``norm`` is ``"rank"``, since the first gradient is averaged by then.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
            >>> weight.square().sum().backward()
            >>> if optimizer.perturb():
            ...     weight.square().sum().backward()
            ...     optimizer.restore()
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        return self._perturb()

    def restore(self) -> None:
        """Puts the weights back, bit-identical, after the second backward pass; ``.grad`` is what to step with.

        Raises:
            InvalidArgumentError: If there was no `perturb`, or there is no gradient: the weights are as they were then
                too, and the step is given up. `abandon` does that without a word.
        """
        self._restore()

    def abandon(self) -> None:
        """Gives up the step that `perturb` or `first_step` has begun: all is as before, the weights bit-identical."""
        self._progress.close()

    @torch.no_grad()
    def _perturb(self) -> bool:
        if self.norm == "rank" and size() > 1:
            raise InvalidArgumentError(
                "perturb and first_step come after the gradients are averaged, and norm='rank' is for those of one "
                f"rank; make it {type(self).__name__}(..., norm='global'), or use passes() or a closure"
            )
        self._check_idle("perturb()")
        self._give_up_ready()
        self.scaler = self._scaler_of_loop() or self.scaler
        step = self._begin(None, begun=self._beginnings.take())
        if self.max_passes == 2:
            self._clipping.judge(step)
        self._progress.begin(step, self._gradient(step))
        for _ in range(self.max_passes):  # the first of two is over
            wanted = self._progress.advance(step)
            if not wanted:
                break
        if not wanted:
            self._after_passes(step)
        return wanted

    @torch.no_grad()
    def _restore(self) -> None:
        step = self._progress.under_way
        if step is None or step.begun is None:
            why = "which has not been called"
            if self._progress.ready is not None:
                why = "and only where it returns True: if optimizer.perturb(): ..."
            raise InvalidArgumentError(f"restore comes after perturb, {why}; the order is {ORDER}")
        if self._scaler_of_loop() is not None:
            self._progress.close()
            raise InvalidArgumentError(self._needs_scaler("its first gradient was scaled, and its second is not"))
        self._progress.advance(step)
        self._after_passes(step)

    def _passes_beside(self, begun: Beginning) -> Generator[int, None, None]:
        """The passes of a step of a trainer's, which makes the step by `step` without a closure, and may clip before.

        As in a loop over `passes`, but the first pass may have begun before: of several micro-batches its last one is
        made in the loop, and the second pass is of all of them. As with `perturb`, gradients are left as the trainer's
        scaler expects them. To leave the loop gives the step up.

        Args:
            begun: How the step began, with ``inside``.

        Yields:
            The index of the pass, from 0.
        """
        self._give_up_ready()
        step = self._begin(None, begun)
        self._progress.begin(step, self._gradient(step))
        try:
            for index in itertools.count():
                with torch.no_grad():
                    if not self._progress.advance(step):
                        break
                yield index
        except BaseException:
            self._progress.close()
            raise
        self._after_passes(step)

    def _warn_of_scaled(self, step: Step) -> None:
        """Warns once where the loop has scaled the loss, as far as that was seen, and has unscaled nothing."""
        if self.scaler.is_enabled() or self._scaled_warned:
            return
        before = not self._any_made and self._surroundings.is_scaled_still(step.every())
        if not (before or self._is_scaled(step)):
            return
        self._scaled_warned = True
        name = type(self).__name__
        when = "before the first" if not self._any_made else "before a"
        warnings.warn(
            f"a GradScaler has scaled a loss and has unscaled no gradient {when} step of {name}, which was "
            f"not given it: if the loss was {name}'s, the step is of scaled gradients, so write {name}(..., "
            "scaler=scaler), or make the step by scaler.step(optimizer)",
            FlatminWarning,
            stacklevel=depth_in_package(),
        )

    def _is_scaled(self, step: Step) -> bool:
        """Whether a scaler that was not given to it has scaled the loss of a pass, and has not unscaled its gradients.

        What a closure of a single pass unscales by itself is right.
        """
        own = (cast(Optimizer, self), self.base_optimizer)
        return any(not any(has_unscaled(scaler, each) for each in own) for scaler in step.scaled_by)

    def _check_scaled(self, step: Step) -> None:
        """Refuses a pass of which that is so."""
        if self._is_scaled(step):
            name = type(self).__name__
            raise InvalidArgumentError(
                f"the loss is scaled by a GradScaler that {name} was not given, so that it would step with scaled "
                f"gradients: {name}(..., scaler=scaler)"
            )

    def _make_passes(self, closure: Callable[..., Any]) -> Step:
        """A step whose passes the closure has made."""
        check_closure(self, closure)
        step = self._begin(closure)
        with self._progress.begun(step, self._gradient(step)):
            for index in itertools.count():
                if not self._progress.advance(step):
                    break
                assert step.closure is not None
                with torch.enable_grad():
                    loss = step.closure()
                check_loss(self, step.closure, loss)
                step.loss = loss if index == 0 else step.loss
                self._check_scaled(step)
        self._after_passes(step)
        return step

    def _run_beside(self, closure: Callable[..., Any]) -> None:
        """Calls a closure that loops give to every step, and that has nothing to compute where one is prepared."""
        handles, reached = [], list[Tensor]()
        parameters: list[Any] = [] if self._progress.ready is None else self._progress.ready.parameters
        for parameter in parameters:
            handles.append(parameter.register_post_accumulate_grad_hook(reached.append))
        try:
            with torch.enable_grad():
                closure()
        finally:
            for handle in handles:
                handle.remove()
        if reached:
            self._progress.close()
            raise InvalidArgumentError(
                "the closure made a backward pass, and perturb() had prepared the step, which it has spoilt: call "
                "step() without a closure after perturb() and restore(), or abandon() before step(closure)"
            )

    def _step_without_closure(self) -> Step:
        """The step whose passes were made without a closure."""
        self._check_idle("step()")
        step = self._progress.take()
        if step is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step needs a closure, to take the gradient where it chooses: "
                f"{self._closure}{self._without_closure}"
            )
        if step.begun is not None:
            self._adopt_scaler(step)
        return step

    def _adopt_scaler(self, step: Step) -> None:
        """Takes a scaler of the loop's that the optimizer was not given; what was computed has to allow it."""
        scaler = self._scaler_of_loop()
        if scaler is None:
            return
        if self._mixes_steps or self._when.before(step.index) is None:
            raise InvalidArgumentError(self._needs_scaler("it compares the gradients of different steps"))
        self.scaler = scaler

    def _needs_scaler(self, why: str) -> str:
        name = type(self).__name__
        return f"{name} has to know the GradScaler of the loop, since {why}: {name}(..., scaler=scaler)"

    def _check_idle(self, what: str) -> None:
        self._progress.check_idle(what)

    def _after_passes(self, step: Step) -> None:
        """The passes are made, and the step is not: it is known whether it is dropped, and how the next one begins."""
        self._dropped = bool(step.failed)
        if step.failed:
            self._skipped += 1
        if not step.failed and step.rho > 0 and (self.max_passes == 1 or step.second_runs):
            self._beside.end(self._surroundings.rest(step.every(), look=True), self.base_optimizer)
        unseen = step.begun is not None and not step.begun.seen and self.max_passes == 2
        self._beginnings.note(Buffers(self._surroundings.modules(step.every())) if unseen else None)

    def _give_up_ready(self) -> None:
        """Says that a step was prepared and never made, unless a scaler has left it out as it was not finite."""
        step = self._progress.take()
        if step is not None and not step.failed and not self._unmade_warned:
            self._unmade_warned = True
            warnings.warn(
                f"a step of {type(self).__name__} was prepared by perturb() and was not made: call step() before the "
                f"next perturb(), the order is {ORDER}; or abandon() to leave it out on purpose (warned once)",
                FlatminWarning,
                stacklevel=5,  # _give_up_ready, _perturb, torch's wrapper, perturb
            )
