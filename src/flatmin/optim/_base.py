"""What every optimizer shares that moves the weights before the gradient is taken."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_choice
from ..errors import InvalidArgumentError, NonFiniteGradientWarning
from ._batchnorm import frozen_statistics
from ._replicas import agreed, local_gradients
from ._tensors import copy_, global_norm

Closure = Callable[[], Any]


class SharpnessAware(Optimizer, ABC):
    """A torch optimizer around another one, whose gradient it takes at perturbed weights.

    It has no parameters and no state of its own: ``param_groups``, ``state`` and ``defaults`` *are* the base
    optimizer's, so that schedulers, ``zero_grad``, ``add_param_group`` and checkpoints work on either.

    A step calls the closure twice, at the weights and at the perturbed weights, restores the weights to the bit, and
    lets the base optimizer step with the second gradient. During the second call running statistics of normalisation
    layers stand still. A step in which the norm of either gradient is not finite is dropped: weights and optimizer
    state stay as they were, `skipped_steps` goes up and the first time a `NonFiniteGradientWarning` says so.

    Under ``DistributedDataParallel`` the second gradient is averaged, and the weights are the same on all ranks after
    the step. With ``norm="rank"`` the first is not: the module is found as it is called and does not synchronise in
    that pass, in none of its micro-batches where the closure goes over several; a ``no_sync`` in the closure goes on to
    hold for the second pass. If a gradient is not finite on one rank, all drop the step. Parameters sharded by FSDP2
    have no gradient of one rank: they are perturbed along the global one, whatever ``norm`` is.

    Args:
        base_optimizer: The optimizer, an instance, that makes the step.
        model: The network. Only needed where its batch-norm layers cannot be seen as they are called. With a compiled
            model it also spares torch's warning of global hooks; give the outermost module then.
        norm: Whose gradient makes the perturbation under ``DistributedDataParallel``. ``"rank"``: each rank perturbs
            along the gradient of its own batch, which is not communicated (m-sharpness, as in SAM's paper).
            ``"global"``: all along the gradient of the whole batch, as one process would.

    Attributes:
        base_optimizer: The optimizer that makes the step.
        skipped_steps: How many steps were dropped because a gradient was not finite.

    Raises:
        InvalidArgumentError: (a ValueError) if ``base_optimizer`` is not a fit optimizer, or ``norm`` is neither.
    """

    def __init__(
        self, base_optimizer: Optimizer, *, model: nn.Module | None = None, norm: Literal["rank", "global"] = "rank"
    ) -> None:
        _check_base(base_optimizer)
        parameters = [parameter for group in base_optimizer.param_groups for parameter in group["params"]]
        super().__init__(parameters, base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self.skipped_steps = 0
        self.norm = check_choice("norm", norm, ("rank", "global"))
        self._model = model
        self._follow()

    @abstractmethod
    def _perturb(self, parameters: list[Tensor], gradients: list[Tensor], norm: float) -> None:
        """Moves ``parameters`` in place to where the second gradient is taken.

        Args:
            parameters: Those that have a gradient.
            gradients: Theirs, at the weights.
            norm: The gradients' L2 norm over all parameters, finite.
        """

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss, as torch's
                own optimizers expect it. Called exactly twice; once where the first gradient is not finite.

        Returns:
            The loss of the first call, at the unperturbed weights.

        Raises:
            InvalidArgumentError: If there is no closure, or it leaves no gradient.
            Exception: Whatever the closure raises; the weights are then as they were.
        """
        if closure is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step needs a closure, because it takes the gradient twice: def closure(): "
                "optimizer.zero_grad(); loss = ...; loss.backward(); return loss"
            )
        closure = torch.enable_grad()(closure)
        with local_gradients(self._model, wanted=self.norm == "rank") as groups:
            loss = closure()
        parameters, gradients = self._gradients()
        norm = agreed(global_norm(gradients), groups)
        if not _finite(norm):
            return self._skip(loss, "first")

        weights = [parameter.clone() for parameter in parameters]
        try:
            self._perturb(parameters, gradients, norm)
            del gradients  # so that the second pass can have their memory
            with frozen_statistics(self._model):
                closure()
        finally:
            copy_(parameters, weights)
        if not _finite(agreed(global_norm(self._gradients()[1]), groups)):
            return self._skip(loss, "second")
        self.base_optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, which is to itself."""
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group(param_group)
        else:  # called by torch's constructor, before there is anything to share
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base optimizer's state, which is all there is."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a plain optimizer's state fits too."""
        self.base_optimizer.load_state_dict(state_dict)

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

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if not gradients:
            raise InvalidArgumentError("the closure left no gradient: it must call loss.backward()")
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise InvalidArgumentError(
                f"{type(self).__name__} needs dense gradients; create the embedding with sparse=False"
            )
        return parameters, gradients

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


def _finite(number: float) -> bool:
    return abs(number) < float("inf")


def _check_base(base: object) -> None:
    if isinstance(base, type):
        raise InvalidArgumentError(
            f"base_optimizer must be an instance, got the class {base.__name__}; "
            f"write {base.__name__}(model.parameters(), lr=...)"
        )
    if not isinstance(base, Optimizer):
        raise InvalidArgumentError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, SharpnessAware):
        raise InvalidArgumentError(f"base_optimizer is a {type(base).__name__} already; wrap the plain optimizer once")
    if isinstance(base, torch.optim.LBFGS):
        raise InvalidArgumentError("base_optimizer must step without a closure of its own, which LBFGS cannot")
