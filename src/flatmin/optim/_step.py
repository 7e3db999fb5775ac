"""The passes of one step, from which each method is put together."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..errors import InvalidArgumentError
from ._batchnorm import frozen_statistics
from ._replicas import agreed, local_gradients
from ._scaling import Scaling
from ._tensors import add_, copy_, global_norm
from ._when import Adaptive, When


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

    A two-pass method calls `first`, and where the step then `pays`, `second`. A one-pass method calls `only`.

    Attributes:
        name: The method's, for errors.
        closure: Computes the gradients.
        number: How many steps were made before.
        rho: Length of the perturbation.
        groups: The parameter groups.
        subset: The parameters that may be perturbed; None for all.
        scaling: What makes a perturbation of a direction.
        when: Which steps pay; None for all.
        model: The network, or None.
        local: Whether to perturb along the gradient of this rank's batch.
        pays: Whether there is a second pass. Final after `first`.
        loss: What the closure returned in its first call.
        parameters: Those with a gradient in the last pass.
        gradients: Theirs.
        norm: The gradients' norm.
        first_norm: The norm of those of the first pass.
    """

    name: str
    closure: Callable[..., Any]
    number: int
    rho: float
    groups: list[dict[str, Any]]
    subset: set[Tensor] | None
    scaling: Scaling
    when: When | None
    model: nn.Module | None
    local: bool
    pays: bool = field(init=False)
    loss: Any = None
    parameters: list[Tensor] = field(init=False, default_factory=list)
    gradients: list[Tensor] = field(init=False, default_factory=list)
    norm: float = field(init=False, default=0.0)
    first_norm: float = field(init=False, default=0.0)
    _ranks: list[ProcessGroup] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        later = self.when is None or isinstance(self.when, Adaptive)
        self.pays = self.rho > 0 and (later or bool(self.when(self.number)))  # type: ignore[call-arg, misc]

    def first(self) -> None:
        """Takes the gradient at the weights, and finds out whether the step pays for a second."""
        local = self.local and self.pays and not isinstance(self.when, Adaptive)
        with local_gradients(self.model, wanted=local) as self._ranks:
            self._run(first=True)
        self._collect("first")
        self.first_norm = self.norm
        if self.pays and isinstance(self.when, Adaptive):
            self.pays = self.when(self.number, self.norm)

    def candidates(self) -> list[Tensor]:
        """All parameters that may be perturbed, with a gradient or without."""
        every = (parameter for group in self.groups for parameter in group["params"])
        return [parameter for parameter in every if self.subset is None or parameter in self.subset]

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

    def second(
        self,
        parameters: list[Tensor] | None = None,
        directions: list[Tensor] | None = None,
        *,
        rho: float | None = None,
        eps: float = 1e-12,
    ) -> None:
        """Takes the gradient up the slope, or along ``directions``, with running statistics frozen.

        The first gradients are given up, and the lists ``directions`` emptied, so that the pass can have their memory.

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
        ):
            self._run()
        self._collect("second")

    def only(self, parameters: list[Tensor], directions: list[Tensor], *, sign: float = 1.0) -> None:
        """Takes the gradient once, at weights moved along ``directions``; at the weights where there are none."""
        if self.rho > 0 and parameters:
            with self._moved(parameters, directions, None, sign * self.rho, 1e-12):
                self._run(first=True)
        else:
            self._run(first=True)
        self._collect("only")

    def _run(self, *, first: bool = False) -> None:
        with torch.enable_grad():
            loss = self.closure()
        if first:
            self.loss = loss

    @contextmanager
    def _moved(
        self, parameters: list[Tensor], directions: list[Tensor], norm: float | None, rho: float, eps: float
    ) -> Iterator[None]:
        offsets, length = self.scaling(parameters, directions, norm) if parameters else ([], 0.0)
        weights = [parameter.clone() for parameter in parameters]
        try:
            add_(parameters, offsets, alpha=rho / (length + eps))
            for given_up in (offsets, directions, self.gradients):
                given_up.clear()
            yield
        finally:
            copy_(parameters, weights)

    def _collect(self, which: str) -> None:
        self.parameters, self.gradients = [], []
        for group in self.groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    self.parameters.append(parameter)
                    self.gradients.append(gradient)
        if not self.gradients:
            raise InvalidArgumentError("the closure left no gradient: it must call loss.backward()")
        if {gradient.layout for gradient in self.gradients} != {torch.strided}:
            raise InvalidArgumentError(f"{self.name} needs dense gradients; create the embedding with sparse=False")
        self.norm = agreed(global_norm(self.gradients), self._ranks)
        if not abs(self.norm) < float("inf"):
            raise NotFiniteError(which)
