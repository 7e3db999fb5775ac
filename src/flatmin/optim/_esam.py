"""ESAM: SAM that perturbs some of the tensors, and takes the second gradient of some of the samples.

Du et al., ICLR 2022.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_integer, check_number
from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._perturbation import Rho, Scaling, forget_computed
from ._step import Passes, Step
from .schedules import Schedule

EVERY_SAMPLE = slice(None)


class PerSampleClosure(Protocol):
    """What ``step`` of `ESAM` takes in place of torch's closure: computes the loss of each sample that is kept.

    It calls neither ``zero_grad`` nor ``backward``, and leaves the losses unscaled where there is a ``scaler``: the
    optimizer does all three. In a step it is called with the whole batch; again with the whole batch, without gradient
    and at the perturbed weights; and there with the samples chosen. In steps without a second pass it is called once.
    Batches cannot be accumulated. Optimizers that take it have the class attribute ``per_sample_closure``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> def losses(keep):
        ...     return torch.nn.functional.cross_entropy(model(x[keep]), y[keep], reduction="none")
    """

    def __call__(self, keep: Tensor | slice, /) -> Tensor:
        """Computes the losses.

        Args:
            keep: Indexes the batch: ``x[keep]``, ``y[keep]``. Either a slice or an integer tensor of sample indices.

        Returns:
            The loss of each sample kept, unreduced, of shape ``(samples kept,)``.
        """


def most_risen(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """Indices of the ``gamma * B`` samples, rounded up, whose loss has risen most."""
    return (after - before).topk(math.ceil(gamma * len(before))).indices


class ESAM(SharpnessAware):
    """ESAM: SAM on random tensors and on the samples that suffer most; one pass, a forward, and ``gamma`` of a pass.

    ::

        each tensor is kept with probability beta;   e = rho / beta * g_kept / (|g_kept| + 1e-7),   0 for the others
        s_i = l_i(w + e) - l_i(w)                    without gradient
        w = base step from w with the gradient at w + e, of the mean over the gamma * B samples of largest s_i

    *Efficient Sharpness-aware Minimization for Improved Training of Neural Networks*, Du et al., ICLR 2022,
    arXiv 2110.03141.

    The optimizer has to choose samples, which no closure of torch's lets it do: ``step`` takes a `PerSampleClosure`,
    and there is no step without one. The forward pass that chooses has the dropout masks of the first, so that losses
    rise by the weights alone. Memory: one copy of the tensors kept.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        rho: Length of the perturbation if all tensors were kept, > 0; default 0.05; 0.05 to 0.2 in the paper. Or a
            function of the base optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        beta: Probability with which a tensor is perturbed, in (0, 1]; default 0.6. A step that keeps none is a plain
            base-optimizer step.
        gamma: Share of the samples in the second pass, in (0, 1]; default 0.5. At 1 there is no forward pass to choose
            them.
        seed: Draws the tensors, with the step index alone: the same on all ranks and after a resume. An integer of at
            least 0; default 0.
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
        norm: Whose gradient makes the perturbation under ``DistributedDataParallel``. ``"rank"`` (default): each rank's
            own, which is not communicated (m-sharpness, as in SAM's paper). ``"global"``: the whole batch's, as one
            process would.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = flatmin.ESAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, beta=0.6, gamma=0.5)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def losses(keep):
        ...     return torch.nn.functional.cross_entropy(model(x[keep]), y[keep], reduction="none")
        >>> first = optimizer.step(losses)
        >>> bool(optimizer.step(losses) < first)
        True
    """

    per_sample_closure = True
    _closure = "def losses(keep): return criterion(model(x[keep]), y[keep], reduction='none')"
    _without_closure = ""

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        rho: Rho = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
        self.beta = check_number("beta", beta, above=0, most=1)
        self.gamma = check_number("gamma", gamma, above=0, most=1)
        self.seed = check_integer("seed", seed, least=0)
        super().__init__(
            base_optimizer,
            rho=rho,
            parameters=parameters,
            scaling=scaling,
            scaler=scaler,
            max_norm=max_norm,
            when=when,
            model=model,
            same_randomness=same_randomness,
            norm=norm,
        )

    def _gradient(self, step: Step) -> Passes:
        losses, before = step.closure, list[Tensor]()
        if losses is None:
            raise InvalidArgumentError(
                f"ESAM makes its passes itself, since it has to choose samples: give step a closure, {self._closure}"
            )
        if not _takes_samples(losses):
            raise InvalidArgumentError(
                f"the closure of ESAM takes the samples to keep, and returns the loss of each: {self._closure}; where "
                "these cannot be had use flatmin.SAM, or to pay less flatmin.LookSAM"
            )
        draw = random.Random(f"{self.seed}:{step.index}")
        kept = {parameter for parameter in step.candidates() if draw.random() < self.beta}
        if not kept:
            step.second_runs = False

        def whole() -> Tensor:
            before.append(self._backward(losses, EVERY_SAMPLE))
            return before[0].mean()

        def share() -> None:
            keep: Tensor | slice = EVERY_SAMPLE
            if self.gamma < 1:
                with torch.no_grad():
                    keep = most_risen(before[0], losses(EVERY_SAMPLE), self.gamma)
                forget_computed()  # without gradient
            self._backward(losses, keep)

        step.closure = whole
        yield from step.first_pass()
        if step.second_runs:
            pairs = [pair for pair in zip(*step.to_perturb(), strict=True) if pair[0] in kept]
            parameters, directions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            del pairs  # or the first gradients would be held during the second pass
            step.closure = share
            yield from step.second_pass(parameters, directions, rho=step.rho / self.beta, eps=1e-7)

    def _backward(self, losses: Callable[..., Any], keep: Tensor | slice) -> Tensor:
        """Leaves the gradient of the mean loss of the samples kept, and returns their losses."""
        self.zero_grad()
        found = losses(keep)
        if not isinstance(found, Tensor) or found.ndim != 1:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InvalidArgumentError(
                f"the closure of ESAM must return one loss a sample, of shape (samples,), got {what}; {self._closure}"
            )
        scaled: Any = self.scaler.scale(found.mean())
        scaled.backward()
        return found.detach()


def _takes_samples(closure: Callable[..., Any]) -> bool:
    try:
        signature(closure).bind(EVERY_SAMPLE)
    except TypeError:
        return False
    except ValueError:  # of a function that Python cannot look into
        return True
    return True
