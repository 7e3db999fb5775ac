"""The passes of one step, from which each method is put together."""

import operator
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._rng import CPU, States, replayed, torch_states
from ..errors import InvalidArgumentError
from ._batchnorm import frozen_statistics
from ._foreach import add_, clones, copy_, global_norm, scale_
from ._loss_scale import LossScale
from ._perturbation import Scaling
from ._second_pass import agreed, local_gradients
from .schedules import Adaptive, When

Passes = Generator[None, None, None]  # yields wherever a pass is due; whoever goes over it makes the pass then


class NotFiniteError(Exception):
    """A gradient of a step is infinite or not a number; the message says which. Never reaches the user."""


def aligned(parameters: list[Tensor], others: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Of ``tensors``, which belong to ``others``, those of ``parameters``; zeros for one that is not among them."""
    if len(parameters) == len(others) and all(map(operator.is_, parameters, others)):
        return tensors
    known = dict(zip(others, tensors, strict=True))
    return [known[p] if p in known else torch.zeros_like(p) for p in parameters]


@dataclass
class Step:
    """One step: what it is made with, and what its last pass has found.

    A two-pass method goes over `first`, and where the step then `pays`, over `second`. A one-pass method goes over
    `only`. Gradients are unscaled after each.

    Attributes:
        name: The method's, for errors.
        closure: Makes a pass; None if whoever goes over the passes makes them.
        number: How many steps were made before.
        rho: Length of the perturbation.
        groups: The parameter groups.
        subset: The parameters that may be perturbed; None for all.
        scaling: What makes a perturbation of a direction.
        when: Which steps pay; None for all.
        model: The network, or None.
        local: Whether to perturb along the gradient of this rank's batch.
        replay: Whether the second pass draws the random numbers of the first.
        max_norm: Norm that the gradient to step with has at most; None for any.
        scale: The scale of the losses.
        pays: Whether there is a second pass. Final after `first`.
        loss: What the closure returned in its first call.
        parameters: Those with a gradient in the last pass.
        gradients: Theirs.
        norm: The gradients' norm.
        first_norm: The norm of those of the first pass.
        failed: Which pass was not finite, so that the step is dropped; empty if none.
    """

    name: str
    closure: Callable[..., Any] | None
    number: int
    rho: float
    groups: list[dict[str, Any]]
    subset: set[Tensor] | None
    scaling: Scaling
    when: When | None
    model: nn.Module | None
    local: bool
    replay: bool
    max_norm: float | None
    scale: LossScale
    pays: bool = field(init=False)
    parameters: list[Tensor] = field(init=False, default_factory=list)
    gradients: list[Tensor] = field(init=False, default_factory=list)
    norm: float = field(init=False, default=0.0)
    first_norm: float = field(init=False, default=0.0)
    loss: Any = field(init=False, default=None)
    failed: str = field(init=False, default="")
    _ranks: list[ProcessGroup] = field(init=False, default_factory=list)
    _random: States = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        later = self.when is None or isinstance(self.when, Adaptive)
        self.pays = self.rho > 0 and (later or bool(self.when(self.number)))  # type: ignore[call-arg, misc]

    def first(self) -> Passes:
        """Takes the gradient at the weights, and finds out whether the step pays for a second."""
        local = self.local and self.pays and not isinstance(self.when, Adaptive)
        if self.pays and self.replay:
            self._random = torch_states({CPU, *(parameter.device for parameter in self._every())})
        with local_gradients(self.model, wanted=local) as self._ranks:
            yield
        self._collect("first")
        self.first_norm = self.norm
        if self.pays and isinstance(self.when, Adaptive):
            self.pays = self.when(self.number, self.norm)
        self.scale.remove(self.gradients, last=not self.pays)

    def candidates(self) -> list[Tensor]:
        """All parameters that may be perturbed, with a gradient or without; not those that are frozen now."""
        trained = [parameter for parameter in self._every() if parameter.requires_grad]
        return [parameter for parameter in trained if self.subset is None or parameter in self.subset]

    def perturbed(self) -> tuple[list[Tensor], list[Tensor]]:
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

    def beside(self, parameters: list[Tensor], first: list[Tensor]) -> tuple[list[Tensor], float]:
        """The ``first`` gradients, of ``parameters``, of those with a second one, and their norm."""
        found = aligned(self.parameters, parameters, first)
        return found, self.first_norm if found is first else float(global_norm(found))

    def second(
        self,
        parameters: list[Tensor] | None = None,
        directions: list[Tensor] | None = None,
        *,
        rho: float | None = None,
        eps: float = 1e-12,
    ) -> Passes:
        """Takes the gradient up the slope, or along ``directions``, with running statistics frozen.

        The first gradients are cleared, and the lists ``directions`` emptied, so that the pass can have their memory,
        and a closure that does not call ``backward`` is noticed.

        Args:
            parameters: Those to perturb; by default all that may be.
            directions: A tensor for each of ``parameters``; by default their gradients.
            rho: Length, if it is not the step's own.
            eps: Added to the norm that the directions are divided by.
        """
        norm = None
        if parameters is None or directions is None:
            parameters, directions = self.perturbed()
            norm = self.norm if directions is self.gradients else None
        with (
            self._moved(parameters, directions, norm, self.rho if rho is None else rho, eps),
            frozen_statistics(self.model),
            replayed(self._random),
        ):
            for parameter in self._every():
                parameter.grad = None
            yield
        self._collect("second")
        self.scale.remove(self.gradients, last=True)

    def only(self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0) -> Passes:
        """Takes the gradient once, at weights moved along ``directions``; at the weights where there are none."""
        moved = self.rho > 0 and len(parameters) > 0
        with self._moved(parameters, directions, None, sign * self.rho, 1e-12) if moved else nullcontext():
            yield
        self._collect("only")
        self.scale.remove(self.gradients, last=True)

    def clip(self) -> None:
        """Shortens the gradient to step with to ``max_norm``, as ``clip_grad_norm_`` does."""
        if self.max_norm is not None:
            factor = self.max_norm / (float(global_norm(self.gradients)) + 1e-6)
            if factor < 1:
                scale_(self.gradients, factor)

    def _every(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]

    @contextmanager
    def _moved(
        self, parameters: list[Tensor], directions: list[Tensor], norm: float | None, rho: float, eps: float
    ) -> Iterator[None]:
        offsets, length = self.scaling(parameters, directions, norm) if parameters else ([], 0.0)
        weights = clones(parameters)
        try:
            add_(parameters, offsets, alpha=rho / (length + eps))
            for given_up in (offsets, directions, self.gradients):
                given_up.clear()
            yield
        finally:
            with torch.no_grad():  # a step that is given up comes here by itself
                copy_(parameters, weights)

    def _collect(self, which: str) -> None:
        found = [(parameter, gradient) for parameter in self._every() if (gradient := parameter.grad) is not None]
        self.parameters, self.gradients = [pair[0] for pair in found], [pair[1] for pair in found]
        if not self.gradients:
            raise InvalidArgumentError("the closure left no gradient: it must call loss.backward()")
        if {gradient.layout for gradient in self.gradients} != {torch.strided}:
            raise InvalidArgumentError(f"{self.name} needs dense gradients; create the embedding with sparse=False")
        self.norm = agreed(global_norm(self.gradients), self._ranks) / self.scale.factor()
        if not abs(self.norm) < float("inf"):
            raise NotFiniteError(which)
