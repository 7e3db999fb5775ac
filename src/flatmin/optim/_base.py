"""What every optimizer shares that moves the weights before the gradient is taken."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_choice, check_integer
from ..errors import InvalidArgumentError, NonFiniteGradientWarning
from ._arguments import check_base, check_subset
from ._memory import Memory
from ._scaling import Rho, Scaling, check_rho, check_scaling, rho_of
from ._step import NotFiniteError, Step
from ._when import Adaptive, When, check_when

Closure = Callable[..., Any]
OWN = "flatmin"  # the key of what is not the base optimizer's in a state dict


class SharpnessAware(Optimizer, ABC):
    """A torch optimizer around another one, whose gradient it takes at perturbed weights.

    A step is a direction x a scaling x a subset x when x what is done with the second gradient. A method, a subclass,
    has a direction and a use for the second gradient; the other three are its arguments.

    ``param_groups``, ``state`` and ``defaults`` *are* the base optimizer's, so that schedulers, ``zero_grad``,
    ``add_param_group`` and checkpoints work on either. What a method remembers beside is kept apart.

    A two-pass step calls the closure at the weights and at the perturbed weights, restores the weights to the bit, and
    lets the base optimizer step with what the method makes of the second gradient; where ``when`` does not pay, or rho
    is 0, the step is the base optimizer's. During the second call running statistics of normalisation layers stand
    still. A one-pass step calls the closure at perturbed weights only: statistics move in it, and its loss is that of
    the perturbed weights. A step in which the norm of a gradient is not finite is dropped: weights and all state stay
    as they were, `skipped_steps` goes up and the first time a `NonFiniteGradientWarning` says so.

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
        when: Which steps pay for a second pass: a function of the step's number, from 0, to a bool, such as `Every`,
            `Late` and `Sometimes`, or `Adaptive`; all by default.
        model: The network. Only needed where its batch-norm layers cannot be seen as they are called. With a compiled
            model it also spares torch's warning of global hooks; give the outermost module then.
        norm: Whose gradient makes the perturbation under ``DistributedDataParallel``. ``"rank"``: each rank perturbs
            along the gradient of its own batch, which is not communicated (m-sharpness, as in SAM's paper).
            ``"global"``: all along the gradient of the whole batch, as one process would; so always do methods that
            use the first gradient otherwise too.

    Attributes:
        base_optimizer: The optimizer that makes the step.
        skipped_steps: How many steps were dropped because a gradient was not finite.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
    """

    _closure = "def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss"

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: Rho,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        when: When | None = None,
        model: nn.Module | None = None,
        norm: Literal["rank", "global"] = "global",
    ) -> None:
        check_base(base_optimizer)
        if isinstance(base_optimizer, SharpnessAware):
            wrapped = type(base_optimizer).__name__
            raise InvalidArgumentError(f"base_optimizer is a {wrapped} already; wrap the plain optimizer once")
        super().__init__([p for group in base_optimizer.param_groups for p in group["params"]], base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self.skipped_steps = 0
        self.rho = check_rho(rho)
        self.norm = check_choice("norm", norm, ("rank", "global"))
        self._when = check_when(when)
        self._subset = check_subset(parameters, base_optimizer)
        self._scaling = check_scaling(scaling)
        self._model = model
        self._steps = 0
        self._memory = Memory()
        self._follow()

    @abstractmethod
    def _gradient(self, step: Step) -> None:
        """Leaves the gradient to step with. Writes to memory after the last pass only, since any pass may fail."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss, as torch's
                own optimizers expect it. Called twice; once by one-pass methods, in steps that do not pay, and where
                the first gradient is not finite.

        Returns:
            The loss of the first call; of two-pass methods at the unperturbed weights.

        Raises:
            InvalidArgumentError: If there is no closure, or it leaves no gradient.
            Exception: Whatever the closure raises; the weights are then as they were.
        """
        if closure is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step needs a closure, to take the gradient where it chooses: {self._closure}"
            )
        step = Step(
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
        )
        try:
            self._gradient(step)
        except NotFiniteError as error:
            return self._skip(step.loss, str(error))
        self.base_optimizer.step()
        if isinstance(self._when, Adaptive):
            self._when.observe(step.first_norm)
        self._steps += 1
        return step.loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, which is to itself."""
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group(param_group)
        else:  # called by torch's constructor, before there is anything to share
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base optimizer's state, and under ``"flatmin"`` what there is beside it."""
        own = {
            "step": self._steps,
            "state": self._memory.state_dict(self.param_groups),
            "when": self._when.state_dict() if isinstance(self._when, Adaptive) else {},
        }
        return {**self.base_optimizer.state_dict(), OWN: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a plain optimizer's state fits too, and begins at step 0."""
        own = {"step": 0, "state": {}, "when": {}, **state_dict.get(OWN, {})}
        steps = check_integer("state_dict['flatmin']['step']", own["step"], least=0)
        memory = Memory.from_state(own["state"], self.param_groups)
        self.base_optimizer.load_state_dict({name: part for name, part in state_dict.items() if name != OWN})
        if isinstance(self._when, Adaptive):
            self._when.load_state_dict(own["when"])
        self._steps, self._memory = steps, memory

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds; hooks and the step a scheduler has patched belong to this object.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def _follow(self) -> None:
        """Shares what the base optimizer has, now and whenever a checkpoint gives it something else."""
        self.base_optimizer.register_load_state_dict_post_hook(lambda _: self._share())
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = self.base_optimizer.defaults

    def _skip(self, loss: Any, which: str) -> Any:
        if self.skipped_steps == 0:
            warnings.warn(
                f"the {which} gradient of a {type(self).__name__} step is not finite: the step was dropped and the "
                "weights are as they were (said once; skipped_steps counts them)",
                NonFiniteGradientWarning,
                stacklevel=5,  # _skip, step, torch's two wrappers
            )
        self.skipped_steps += 1
        return loss
