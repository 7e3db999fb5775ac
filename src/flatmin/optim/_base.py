"""What every optimizer shares that moves the weights before the gradient is taken."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from .._checks import check_choice, check_integer, check_module, check_number
from ._arguments import check_subset
from ._loss_scale import LossScale
from ._memory import Memory
from ._options import EachRank, OnePass, TwoPasses, check_scaler, check_taken
from ._passes import Closure, InPasses
from ._perturbation import Rho, check_rho, check_scaling, rho_of
from ._step import Step
from .schedules import Adaptive, check_when

if TYPE_CHECKING:
    from typing_extensions import Unpack

OWN = "flatmin"  # the key of what is not the base optimizer's in a state dict


class SharpnessAware(InPasses, ABC):
    """A torch optimizer around another one, whose gradient it takes at perturbed weights.

    A step is a direction x a scaling x a subset x when x what is done with the second gradient. A method, a subclass,
    has a direction and a use for the second gradient; the other three are its arguments.

    ``param_groups``, ``state`` and ``defaults`` *are* the base optimizer's, so that schedulers, ``zero_grad``,
    ``add_param_group`` and checkpoints work on either. What a method remembers beside is kept apart.

    A two-pass step calls the closure at the weights and at the perturbed weights, restores the weights to the bit, and
    lets the base optimizer step with what the method makes of the second gradient; where ``when`` does not pay, or rho
    is 0, the step is the base optimizer's. During the second call running statistics of normalisation layers stand
    still, and dropout takes the masks of the first. A one-pass step calls the closure at perturbed weights only:
    statistics move in it, and its loss is that of the perturbed weights. A step in which the norm of a gradient is not
    finite is dropped: weights and all state stay as they were, `skipped_steps` goes up and the first time a
    `NonFiniteGradientWarning` says so, unless there is a scaler, which looks for its scale in this way.

    Under ``DistributedDataParallel`` the second gradient is averaged, and the weights are the same on all ranks after
    the step. With ``norm="rank"`` the first is not: the module is found as it is called and does not synchronise in
    that pass, in none of its micro-batches where the closure goes over several; a ``no_sync`` in the closure goes on to
    hold for the second pass. In a step without a second pass the first is averaged. If a gradient is not finite on one
    rank, all drop the step. Parameters sharded by FSDP2 have no gradient of one rank: they are perturbed along the
    global one, whatever ``norm`` is.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        rho: Length of the perturbation over all perturbed parameters together, > 0; or a function of the base
            optimizer, called each step, to a length >= 0, such as `RhoByLR`.
        parameters: Those to perturb; all by default. For normalisation layers only (SAM-ON):
            ``flatmin.optim.normalization_parameters(model)``. All are trained.
        scaling: What makes the perturbation of the direction: one norm over all by default, `Elementwise` as in ASAM.
        scaler: The ``torch.amp.GradScaler`` that the closure scales the loss with, where it trains in float16. All
            gradients that a method sees are unscaled; ``scaler.update()`` after each step remains to be called.
        max_norm: The gradient that the base optimizer steps with is brought to this norm if it is longer, > 0; the one
            that makes the perturbation is not.
        when: Which steps pay for a second pass: a function of the step's number, from 0, to a bool, such as `Every`,
            `Late` and `Sometimes`, or `Adaptive`; all by default. Of two-pass methods, as the next two.
        model: The network. Only needed where its batch-norm layers cannot be seen as they are called. With a compiled
            model it also spares torch's warning of global hooks; give the outermost module then.
        same_randomness: Whether the second pass draws the random numbers of the first from torch's generators, and
            leaves them as one pass would; so by default.
        norm: Of SAM, ASAM and ESAM: whose gradient makes the perturbation under ``DistributedDataParallel``.
            ``"rank"``, the default: each rank perturbs along the gradient of its own batch, which is not communicated
            (m-sharpness, as in SAM's paper). ``"global"``: all along the gradient of the whole batch, as one process
            would; so always do the other methods, which use the first gradient otherwise too.

    Attributes:
        base_optimizer: The optimizer that makes the step.
        skipped_steps: How many steps were dropped because a gradient was not finite.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
    """

    _common: ClassVar[type[OnePass]] = TwoPasses  # the arguments that it takes of those below

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho,
        **common: Unpack[EachRank],
    ) -> None:
        check_taken(type(self), common, self._common)
        super().__init__(base_optimizer)
        self.rho = check_rho(rho)
        own = "rank" if self._common is EachRank else "global"
        self.norm = check_choice("norm", common.get("norm", own), ("rank", "global"))
        self.scaler = check_scaler(common.get("scaler"))
        max_norm = common.get("max_norm")
        self.max_norm = None if max_norm is None else check_number("max_norm", max_norm, above=0)
        self._when = check_when(common.get("when"))
        self._subset = check_subset(common.get("parameters"), base_optimizer)
        self._scaling = check_scaling(common.get("scaling"))
        model = common.get("model")
        self._model = None if model is None else check_module("model", model)
        self._replay = bool(common.get("same_randomness", True))
        self._steps = 0
        self._memory = Memory()

    def state_dict(self) -> dict[str, Any]:
        """Returns the base optimizer's state, and under ``"flatmin"`` what there is beside it."""
        self._check_idle("state_dict")
        own = {
            "step": self._steps,
            "state": self._memory.state_dict(self.param_groups),
            "when": self._when.state_dict() if isinstance(self._when, Adaptive) else {},
        }
        return {**self.base_optimizer.state_dict(), OWN: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a plain optimizer's state fits too, and begins at step 0."""
        self._check_idle("load_state_dict")
        own = {"step": 0, "state": {}, "when": {}, **state_dict.get(OWN, {})}
        steps = check_integer("state_dict['flatmin']['step']", own["step"], least=0)
        memory = Memory.from_state(own["state"], self.param_groups)
        self.base_optimizer.load_state_dict({name: part for name, part in state_dict.items() if name != OWN})
        if isinstance(self._when, Adaptive):
            self._when.load_state_dict(own["when"])
        self._steps, self._memory = steps, memory

    def _begin(self, closure: Closure | None) -> Step:
        return Step(
            name=type(self).__name__,
            closure=closure,
            number=self._steps,
            rho=rho_of(self.rho, self.base_optimizer),
            groups=self.param_groups,
            subset=self._subset,
            scaling=self._scaling,
            when=self._when,
            model=self._model,
            local=self.norm == "rank",
            replay=self._replay,
            max_norm=self.max_norm,
            scale=LossScale(self.scaler, self.base_optimizer),
        )

    def _made(self, step: Step) -> None:
        if isinstance(self._when, Adaptive):
            self._when.observe(step.first_norm)
        self._steps += 1
