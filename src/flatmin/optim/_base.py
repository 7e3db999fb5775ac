"""What every optimizer shares that moves the weights before the gradient is taken: arguments, step and passes."""

import copy
import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_choice, check_integer, check_module, check_number
from .._distributed import size
from ..errors import FlatminWarning, InvalidArgumentError, NonFiniteGradientWarning
from ._perturbation import Rho, Scaling, check_rho, check_scaling, check_subset, rho_of, rounded_away
from ._step import LossScale, NotFiniteError, Passes, Step
from ._surroundings import Buffers, Surroundings
from ._wrapper import Memory, Wrapper
from .schedules import Every, Schedule, as_schedule


class SharpnessAware(Wrapper):
    """A torch optimizer around another one that takes its gradient at perturbed weights: the base of all methods here.

    ``param_groups``, ``state`` and ``defaults`` *are* the base optimizer's, so that schedulers, ``zero_grad``,
    ``add_param_group`` and checkpoints work on either. A method's own memory is kept apart.

    A two-pass step calls the closure at the weights and at the perturbed weights, restores the weights (bit-identical),
    and lets the base optimizer step with what the method makes of the second gradient. Where ``when`` returns False, or
    rho is 0, the step is a plain base-optimizer step: one closure call. During the second call running statistics of
    torch's normalisation layers stand still, with ``model`` all buffers do, and dropout takes the masks of the first;
    what other optimizers train gets the gradient of the second call alone. A one-pass step calls the closure once,
    at perturbed weights: statistics move in it, and its loss is that of the perturbed weights.

    A step is dropped if a gradient is not finite: weights, those buffers and all state stay as they were,
    ``skipped_steps`` goes up, and a `NonFiniteGradientWarning` is given once; not with a ``scaler``, which looks for
    its scale in this way.

    Under ``DistributedDataParallel`` the second gradient is averaged, and the weights are the same on all ranks after
    the step. With ``norm="rank"`` the first is not: the module is found as it is called and does not synchronise in
    that pass, in none of its micro-batches where the closure goes over several; a ``no_sync`` in the closure goes on to
    hold for the second pass. In a step without a second pass the first is averaged. If a gradient is not finite on one
    rank, all drop the step. Parameters sharded by FSDP2 have no gradient of one rank: they are perturbed along the
    global one, whatever ``norm`` is.

    A method is a subclass with a direction, and a use for the second gradient; it takes the arguments below that apply
    to it.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0. Or a function of the base
            optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        parameters: The tensors to perturb, some of the base optimizer's. None (default): all. All are trained in any
            case. For SAM-ON: ``flatmin.optim.normalization_parameters(model)``.
        scaling: How the direction becomes a perturbation. None (default): divided by its L2 norm over all perturbed
            parameters. `Elementwise`: in proportion to each weight, as in ASAM.
        scaler: The ``torch.amp.GradScaler`` that the closure scales the loss with, for float16. None (default): the
            loss is not scaled. Call ``scaler.update()`` after each step.
        max_norm: Clips the gradient that the base optimizer steps with to this L2 norm, > 0. None (default): no
            clipping. The gradient that makes the perturbation is never clipped.
        when: In which steps the second pass runs: a function of the step index (from 0) to a bool, or a `Schedule`
            such as `Every`, `Late`, `Sometimes` and `Adaptive`. None (default): in all.
        model: The network, the outermost module; all its buffers then stand still in the second pass and in a step that
            is dropped. None (default): those of torch's normalisation layers do, which are looked for, and DDP modules
            are found as they are called. Give it if other buffers move in a forward pass (spectral norm, codebooks, own
            layers), and for a compiled model, of which torch warns otherwise.
        same_randomness: True (default): the second pass draws the random numbers of the first from the generators of
            torch, Python and numpy, and leaves them as one pass would. False: it draws new ones.
        norm: Whose gradient makes the perturbation under ``DistributedDataParallel``. ``"rank"``: each rank's own,
            which is not communicated (m-sharpness, as in SAM's paper). ``"global"`` (the default here): the whole
            batch's, as one process would.

    Attributes:
        base_optimizer: The optimizer that makes the step.
        skipped_steps: How many steps were dropped because a gradient was not finite.
        step_dropped: Whether the last step was.
        max_passes: Of the class: how many forward-backward passes a step has at most, 1 or 2.
        per_sample_closure: Of the class: whether `step` takes a `PerSampleClosure` in place of torch's closure.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
    """

    max_passes: ClassVar[int] = 2
    per_sample_closure: ClassVar[bool] = False
    _closure = "def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss"
    _without_closure = (
        "; or make the passes in a loop: for _ in optimizer.passes(): ..., or use first_step, second_step"
    )

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
        norm: Literal["rank", "global"] = "global",
    ) -> None:
        super().__init__(base_optimizer)
        self.rho = check_rho(rho)
        self.scaler = check_scaler(scaler)
        self.max_norm = None if max_norm is None else check_number("max_norm", max_norm, above=0)
        self.norm = check_choice("norm", norm, ("rank", "global"))
        self.skipped_steps = 0
        self.step_dropped = False
        self._subset = check_subset(parameters, base_optimizer)
        self._scaling = check_scaling(scaling)
        self._when = as_schedule(when)
        self._when_new = copy.deepcopy(self._when.state_dict())  # to begin anew with a state that has none
        self._surroundings = Surroundings(None if model is None else check_module("model", model))
        self._replay = bool(same_randomness)
        self._steps = 0  # that were made
        self._memory = Memory()
        self._under_way = False
        self._checked = False  # whether weights were moved before
        self._coarse: torch.dtype | None = None  # of weights that are too coarse for it, to be warned of
        self._before: Buffers | None = None  # for the step that first_step is about to begin
        self._ready: Step | None = None  # whose passes are all made, without a closure
        self._suspended: Generator[int, None, None] | None = None  # the step that first_step has begun
        self._over = False  # whether first_step has made a whole step

    @abstractmethod
    def _gradient(self, step: Step) -> Passes:
        """Yields where a pass is due, and leaves the gradient that the base optimizer is to step with.

        Writes to memory after the last pass only, since any pass may fail.
        """

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss, as torch's
                own optimizers expect it. Called twice; once by one-pass methods, in steps without a second pass, and
                where the first gradient is not finite.

        Returns:
            The loss of the first call; of two-pass methods at the unperturbed weights.

        Raises:
            InvalidArgumentError: If there is no closure, or it leaves no gradient.
            Exception: Whatever the closure raises; the weights are then as they were.
        """
        step = self._step_without_closure() if closure is None else self._make_passes(closure)
        self.step_dropped = bool(step.failed)
        if self._coarse is not None:
            warnings.warn(
                f"the weights are {self._coarse}, in which most of {type(self).__name__}'s perturbation is rounded "
                "away: keep them in float32 and compute in lower precision with torch.autocast (warned once)",
                FlatminWarning,
                stacklevel=4,  # step, torch's two wrappers
            )
            self._coarse = None
        if step.failed:
            if self.skipped_steps == 0 and not step.scale.enabled:
                warnings.warn(
                    f"the {step.failed} gradient of a {type(self).__name__} step is not finite: the step was dropped "
                    "and the weights are as they were (warned once; skipped_steps counts them)",
                    NonFiniteGradientWarning,
                    stacklevel=4,  # step, torch's two wrappers
                )
            self.skipped_steps += 1
        else:
            self.base_optimizer.step()
            torch.clear_autocast_cache()  # of an autocast around several steps
            self._when.observe(self._steps, step.first_norm)
            self._steps += 1
        return step.loss

    def passes(self) -> Generator[int, None, None]:
        """Makes one step in a loop over its passes, where no closure can be given.

        The loop's body is what the closure would be: it clears the gradients, computes the loss and calls
        ``backward()``. After the last pass the base optimizer steps. To ``break``, or raise, gives the step up: the
        weights are then bit-identical to before.

        Yields:
            The index of the pass, from 0.

        Raises:
            InvalidArgumentError: If a pass leaves no gradient.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
            >>> for index in optimizer.passes():
            ...     optimizer.zero_grad()
            ...     weight.square().sum().backward()
        """
        step = self._begin(None)
        step.before, self._before = self._before, None
        with closing(self._run(step)) as passes:
            for index in itertools.count():
                with torch.no_grad():
                    if next(passes, step) is step:
                        break
                yield index
        self._ready = step
        try:
            self.step()
        finally:
            self._ready = None

    def first_step(self, zero_grad: bool = False) -> bool:
        """Moves the weights, after the first backward pass; in one-pass methods before the only one.

        For loops written for optimizers with two steps, such as davda54/sam and pytorch-optimizer. Prefer `passes`:
        here the first pass is over before the optimizer knows of it, so that dropout takes other masks in the second,
        and no rank can have kept its gradient to itself. A step that is dropped puts buffers back to where they were
        after the step before; the first of all cannot. Gradients of other optimizers are yours to clear.

        Args:
            zero_grad: Whether to clear the gradients afterwards. Where a second pass is wanted they are in any case.

        Returns:
            Whether another backward pass is wanted, and `second_step` after it. Where not, the step is made, or was
            dropped, and a `second_step` does nothing; a loop that does not ask makes that pass for nothing, and running
            statistics move in it.

        Raises:
            InvalidArgumentError: If there is no gradient, or one step is under way already.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
            >>> weight.square().sum().backward()
            >>> if optimizer.first_step(zero_grad=True):
            ...     weight.square().sum().backward()
            ...     optimizer.second_step(zero_grad=True)
        """
        if self.norm == "rank" and size() > 1:
            raise InvalidArgumentError(
                "first_step comes after the gradients are averaged, and norm='rank' is for those of one rank; "
                f"make it {type(self).__name__}(..., norm='global'), or use passes()"
            )
        suspended, early = self.passes(), self.max_passes == 2
        self._before = self._surroundings.between if early else None
        for _ in range(self.max_passes):
            wanted = next(suspended, None) is not None
        self._suspended, self._over = (suspended, False) if wanted else (None, True)
        if not wanted:
            self._note_buffers()
        if zero_grad:
            self.zero_grad()
        return wanted

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and makes the step, with the gradients of the pass after `first_step`.

        Args:
            zero_grad: Whether to clear the gradients afterwards.

        Raises:
            InvalidArgumentError: If there was no `first_step`, or there is no gradient.
        """
        suspended, over, self._suspended, self._over = self._suspended, self._over, None, False
        if suspended is not None:
            next(suspended, None)
            self._note_buffers()
        elif not over:
            raise InvalidArgumentError("second_step comes after first_step, which has not been called")
        if zero_grad:
            self.zero_grad()

    def abandon(self) -> None:
        """Gives up the step that `first_step` has begun: all is as before, the weights bit-identical."""
        suspended, self._suspended, self._over = self._suspended, None, False
        if suspended is not None:
            suspended.close()

    def _note_buffers(self) -> None:
        """Copies the buffers after a step whose successor's first pass may be over before the optimizer knows."""
        if self.max_passes == 2:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self._surroundings.between = Buffers(self._surroundings.modules(parameters))

    def __repr__(self) -> str:
        """The method with its numbers and its ``when``, around the base optimizer with its groups."""
        own = {name: vars(self)[name] for name in signature(type(self)).parameters if name in vars(self)}
        own |= {"when": self._when} if self._when != Every(1) else {}
        shown = [
            f"{name}={value!r}"
            for name, value in own.items()
            if value is not None and not isinstance(value, (Optimizer, GradScaler))
        ]
        return f"{type(self).__name__}({', '.join(shown)}) around {self.base_optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("a copy")
        return super().__getstate__()

    def _own_state(self) -> dict[str, Any]:
        self._check_idle("state_dict")
        return {
            "step": self._steps,
            "state": self._memory.state_dict(self.param_groups),
            "when": self._when.state_dict(),
        }

    def _load(self, base: dict[str, Any], own: dict[str, Any]) -> None:
        self._check_idle("load_state_dict")
        steps = check_integer("state_dict['flatmin']['step']", own.get("step", 0), least=0)
        memory = Memory.from_state(own.get("state", {}), self.param_groups)
        self.base_optimizer.load_state_dict(base)
        self._when.load_state_dict(own.get("when") or copy.deepcopy(self._when_new))
        self._steps, self._memory = steps, memory
        self._surroundings.between = None

    def _begin(self, closure: Callable[..., Any] | None) -> Step:
        """A new step, of which nothing is done."""
        return Step(
            name=type(self).__name__,
            closure=closure,
            index=self._steps,
            rho=rho_of(self.rho, self.base_optimizer),
            groups=self.param_groups,
            subset=self._subset,
            scaling=self._scaling,
            when=self._when,
            surroundings=self._surroundings,
            local=self.norm == "rank",
            replay=self._replay,
            max_norm=self.max_norm,
            scale=LossScale(self.scaler, self.base_optimizer),
            check=None if self._checked else self._check_rounding,
        )

    def _make_passes(self, closure: Callable[..., Any]) -> Step:
        """A step whose passes the closure has made."""
        step = self._begin(closure)
        with closing(self._run(step)) as passes:
            for index, _ in enumerate(passes):
                assert step.closure is not None
                with torch.enable_grad():
                    loss = step.closure()
                step.loss = loss if index == 0 else step.loss
        return step

    def _step_without_closure(self) -> Step:
        """The step whose passes were made without a closure."""
        step, self._ready = self._ready, None
        if step is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step needs a closure, to take the gradient where it chooses: "
                f"{self._closure}{self._without_closure}"
            )
        return step

    def _run(self, step: Step) -> Passes:
        """The passes of a step: a generator that yields where one is due. To close it undoes all that it has moved."""
        self._check_idle("another step")
        self._under_way, self._ready = True, None
        try:
            yield from self._gradient(step)
            step.clip()
        except NotFiniteError as error:
            step.failed = str(error)
            step.scale.overflowed(step.gradients)
            if step.before is not None:
                step.before.restore()
        finally:
            self._under_way = False

    def _check_rounding(self, moved: list[Tensor], weights: list[Tensor], offsets: list[Tensor]) -> None:
        """Notes, in the first step that moves weights, whether these are too coarse for it."""
        self._checked, self._coarse = True, rounded_away(moved, weights, offsets)

    def _check_idle(self, what: str) -> None:
        if self._under_way:
            raise InvalidArgumentError(
                f"{what} while a step is under way, at perturbed weights perhaps: let its last pass be made, as "
                "second_step() does, or give it up with abandon()"
            )


def check_scaler(scaler: GradScaler | None) -> GradScaler:
    """Returns ``scaler``; one that does nothing where it is None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise InvalidArgumentError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    return GradScaler("cpu", enabled=False) if scaler is None else scaler
