"""What every optimizer shares that moves the weights before the gradient is taken: arguments, step and passes."""

import copy
import itertools
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_choice, check_flag, check_integer, check_mapping, check_module, check_number, shown, trains
from .._privacy import check_not_trained_privately
from ..errors import FlatminWarning, InvalidArgumentError, StateDictError
from ._dropping import Dropping
from ._first_move import faults_of_move
from ._first_pass import Beginning
from ._memory import Memory
from ._perturbation import Rho, Scaling, check_rho, check_scaling, check_subset, rho_of, unit
from ._scale import LossScale
from ._step import Passes, Step
from ._stepping import Stepping
from ._surroundings import Surroundings
from ._wrapper import Wrapper, check_minimizes
from .schedules import Every, Schedule, as_schedule


class SharpnessAware(Stepping, Wrapper):
    """A torch optimizer around another one that takes its gradient at perturbed weights: the base of all methods here.

    ``param_groups``, ``state`` and ``defaults`` *are* the base optimizer's, so that schedulers, ``zero_grad``,
    ``add_param_group`` and checkpoints work on either. A method's own memory is kept apart.

    A two-pass step calls the closure at the weights and at the perturbed weights, restores the weights (bit-identical),
    and lets the base optimizer step with what the method makes of the second gradient. Where ``when`` returns False, or
    rho is 0, the step is a plain base-optimizer step: one closure call. During the second call running statistics of
    torch's normalisation layers stand still, with ``model`` all buffers do, and dropout takes the masks of the first;
    what else is trained gets the gradient of the second call alone. A one-pass step calls the closure once,
    at perturbed weights: statistics move in it, and its loss is that of the perturbed weights.

    A step is dropped if a gradient is not finite: weights, those buffers and all state stay as they were,
    ``skipped_steps`` goes up, and a `NonFiniteGradientWarning` is given once; not with a ``scaler``, which looks for
    its scale in this way.

    On an accelerator the host does not wait in a step: gradients are measured and a step is dropped there, and the host
    is told with the next step, with which the warning comes. It waits once a step around a base optimizer that is not
    torch's own, and in each pass with a ``scaler``, where ``when`` looks at the gradient, as `Adaptive` does, and where
    parameters are on several devices.

    Under ``DistributedDataParallel`` the second gradient is averaged, and the weights are the same on all ranks after
    the step. With ``norm="rank"`` the first is not: the module is found as it is called and does not synchronise in
    that pass, in none of its micro-batches where the closure goes over several; a ``no_sync`` in the closure goes on to
    hold for the second pass. In a step without a second pass the first is averaged. If a gradient is not finite on one
    rank, all drop the step. Parameters sharded by FSDP2 have no gradient of one rank: they are perturbed along the
    global one, whatever ``norm`` is.

    A method is a subclass with a direction, and a use for the second gradient; it takes the arguments below that apply
    to it.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
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
        skipped_steps: How many steps were dropped because a gradient was not finite. On an accelerator, to ask waits.
        step_dropped: Whether the last step was; likewise.
        max_passes: Of the class: how many forward-backward passes a step has at most, 1 or 2.
        per_sample_closure: Of the class: whether `step` takes a `PerSampleClosure` in place of torch's closure.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
    """

    max_passes: ClassVar[int] = 2
    per_sample_closure: ClassVar[bool] = False
    _closure = "def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss"
    _without_closure = (
        "; or make the passes in a loop: for _ in optimizer.passes(): ..., or use perturb, restore and step, or "
        "first_step, second_step; in Lightning, the callback flatmin.integrations.lightning.SharpnessAware(), with "
        "Accelerate flatmin.integrations.accelerate.sharpness_aware, and in transformers' Trainer the mixin "
        "flatmin.integrations.transformers.Sharpness; in timm's train.py, --opt flatmin_msam or flatmin_s2sam"
    )

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
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
        self._skipped = 0
        self._dropped = False
        self._subset = check_subset(parameters, self.base_optimizer)
        self._scaling = check_scaling(scaling)
        self._when = as_schedule(when)
        self._when_new = copy.deepcopy(self._when.state_dict())  # to begin anew with a state that has none
        self._surroundings = Surroundings(None if model is None else check_trained(model, self.base_optimizer))
        self._replay = check_flag("same_randomness", same_randomness)
        self._steps = 0  # that were made
        self._memory = Memory()
        self._checked = False  # whether weights were moved before
        self._faults: list[FlatminWarning] = []  # found when weights were first moved, to be warned of
        self._over = False  # whether first_step has made a whole step
        self._set_up()

    @abstractmethod
    def _gradient(self, step: Step) -> Passes:
        """Yields where a pass is due, and leaves the gradient that the base optimizer is to step with.

        Writes to memory after the last pass only, since any pass may fail.
        """

    def passes(self) -> Generator[int, None, None]:
        """Makes one step in a loop over its passes, where no closure can be given.

        The loop's body is what the closure would be: it clears the gradients, computes the loss and calls
        ``backward()``. After the last pass the base optimizer steps. To ``break``, or raise, gives the step up: the
        weights are then bit-identical to before.

        Yields:
            The index of the pass, from 0.

        Raises:
            InvalidArgumentError: If a pass leaves no gradient, or scales its loss by a scaler that was not given.

        Example:
            >>> import torch, flatmin
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = flatmin.SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
            >>> for index in optimizer.passes():
            ...     optimizer.zero_grad()
            ...     weight.square().sum().backward()
        """
        self._check_idle("another step")
        self._give_up_ready()
        step = self._begin(None)
        with self._progress.begun(step, self._gradient(step)):
            for index in itertools.count():
                with torch.no_grad():
                    if not self._progress.advance(step):
                        break
                yield index
                self._check_scaled(step)
            self._after_passes(step)
            self.step()

    def first_step(self, zero_grad: bool = False) -> bool:
        """Moves the weights, after the first backward pass; in one-pass methods before the only one.

        For loops written for optimizers with two steps, such as davda54/sam and pytorch-optimizer. It is `perturb`,
        and where no second pass is wanted, `step`; `perturb` says what is known of the first pass.

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
        wanted = self._perturb()
        if not wanted:
            self.step()
        self._over = not wanted
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
        over, self._over = self._over, False
        if self._progress.under_way is not None:
            self._restore()
            self.step()
        elif not over:
            raise InvalidArgumentError("second_step comes after first_step, which has not been called")
        if zero_grad:
            self.zero_grad()

    def __repr__(self) -> str:
        """The method with its numbers and its ``when``, around the base optimizer with its groups."""
        own = {name: vars(self)[name] for name in signature(type(self).__init__).parameters if name in vars(self)}
        own |= {"when": self._when} if self._when != Every(1) else {}
        shown = [
            f"{name}={value!r}"
            for name, value in own.items()
            if value is not None and not isinstance(value, (Optimizer, GradScaler))
        ]
        return f"{type(self).__name__}({', '.join(shown)}) around {self.base_optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("a copy")
        self._settle(stacklevel=3)
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THIS_OBJECT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()

    def _own_state(self) -> dict[str, Any]:
        self._check_idle("state_dict")
        self._settle(stacklevel=3)
        return {
            "step": self._steps,
            "state": self._memory.state_dict(self.param_groups),
            "when": self._when.state_dict(),
        }

    def _load(self, base: dict[str, Any], own: dict[str, Any]) -> None:
        self._check_idle("load_state_dict")
        if any("old_p" in entries for entries in base.get("state", {}).values()):
            raise StateDictError(
                "the state is that of another library's SAM, which has a copy of the weights (old_p) and not the "
                "base optimizer's momentum: load the network's state alone, and begin with a new optimizer"
            )
        steps = check_integer("state_dict['flatmin']['step']", own.get("step", 0), least=0)
        memory = Memory.from_state(own.get("state", {}), self.param_groups)
        self._settle(stacklevel=3)
        self._dropping = Dropping()
        when = check_mapping("state_dict['flatmin']['when']", own.get("when") or copy.deepcopy(self._when_new))
        before = copy.deepcopy(self._when.state_dict())
        self._when.load_state_dict(dict(when))
        try:
            self.base_optimizer.load_state_dict(base)
        except BaseException:
            self._when.load_state_dict(before)
            raise
        self._steps, self._memory = steps, memory
        self._progress.close()
        self._beginnings.note(None)

    def _begin(self, closure: Callable[..., Any] | None, begun: Beginning | None = None) -> Step:
        check_not_trained_privately(type(self).__name__, self)
        check_minimizes(self.base_optimizer)
        self._memory.forget()  # what a step that was not made would have remembered
        self._beside.begin(self._surroundings.rest([], look=False))
        rho = rho_of(self.rho, self.base_optimizer)
        return Step(
            name=type(self).__name__,
            closure=closure,
            index=self._steps,
            rho=rho,
            groups=self.param_groups,
            subset=self._subset,
            scaling=self._scaling,
            when=self._when,
            surroundings=self._surroundings,
            beginnings=self._beginnings,
            begun=begun,
            seen=self._seen,
            local=self.norm == "rank" and (begun is None or begun.inside),
            replay=self._replay,
            max_norm=self.max_norm,
            scale=LossScale(self.scaler, self, outside=begun is not None),
            base=self.base_optimizer,
            dropping=self._dropping,
            clipping=self._clipping,
            check=None if self._checked else partial(self._check_move, rho=rho),
        )

    def _scaler_of_loop(self) -> GradScaler | None:
        return None if self.scaler.is_enabled() else self._surroundings.scaler_of(self)

    def _check_move(self, *move: list[Tensor], rho: float) -> None:
        """Notes, in the first step that moves weights, what is wrong with that."""
        trained = (parameter for group in self.param_groups for parameter in group["params"])
        known = rho if self._scaling is unit else None
        self._checked = True
        self._faults = list(faults_of_move(type(self).__name__, *move, rho=known, trained=trained))


_OF_THIS_OBJECT = ("_progress", "_beginnings", "_seen", "_dropping", "_beside", "_clipping")


def check_trained(model: nn.Module, base: Optimizer) -> nn.Module:
    """Returns ``model`` if the base optimizer trains some of it."""
    if not trains(base, check_module("model", model)):
        raise InvalidArgumentError(
            f"model, {shown(model)}, has none of the parameters that base_optimizer trains; give the network that "
            "these belong to"
        )
    return model


def check_scaler(scaler: GradScaler | None) -> GradScaler:
    """Returns ``scaler``; one that does nothing where it is None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise InvalidArgumentError(f"scaler must be a torch.amp.GradScaler, got {shown(scaler)}")
    return GradScaler("cpu", enabled=False) if scaler is None else scaler
