"""SQuAT: SAM on the weights and learning the step sizes of their quantiser, in turn. Wang et al. 2022."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._base import SharpnessAware
from ._foreach import clones, length, plus
from ._perturbation import Rho, Scaling, check_subset
from ._step import Passes, Step
from .schedules import Schedule


class SQuAT(SharpnessAware):
    """SQuAT: quantisation-aware training in which SAM moves the weights, and every ``period``-th step the step sizes.

    ::

        w = base step from w with the gradient at w + e, e = rho * g / (|g| + 1e-12), step sizes frozen
        s = base step from s with its gradient at w, weights frozen                   in every period-th step

    *SQuAT: Sharpness- and Quantization-Aware Training for BERT*, Wang et al. 2022, arXiv 2210.07171. The paper
    alternates the two objectives; how often, and whether ``e`` is added before or after rounding, is not known, and no
    code was published: here they alternate by step, and ``perturb`` chooses.

    It works with any fake quantiser whose step sizes (scales) are parameters; for torchao's, see
    ``flatmin.integrations.torchao``. What is frozen has no gradient when the base optimizer steps, so that neither
    decay nor momentum moves it. A step that would make a step size 0 or negative halves it instead. Give step sizes a
    group of their own, with a learning rate of about a hundredth of their size and no weight decay. Costs two passes a
    step, one in every ``period``-th; one copy of the weights.

    Args:
        base_optimizer: The torch optimizer that makes the step: an instance, such as ``torch.optim.SGD(...)``. Or a
            list of several, with one perturbation over the parameters of all.
        step_sizes: The quantiser's step sizes, some of the base optimizer's parameters.
        rho: Length of the perturbation, an L2 norm over all weights, > 0; default 0.05. Or a function of the base
            optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        period: Steps from one that learns the step sizes to the next, at least 2; default 2: every other one does.
        perturb: What is moved. ``"weights"`` (default): the weights, before rounding. ``"quantized"``: what the
            ``quantizers`` make of them, after rounding, as in SAQ (Liu et al. 2021, arXiv 2111.12273); the norm is over
            those.
        quantizers: For ``perturb="quantized"``: the modules that make quantised weights of weights; default ().
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
        >>> weight, size = torch.nn.Parameter(torch.tensor([0.7, -0.4])), torch.nn.Parameter(torch.tensor([0.25]))
        >>> base = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [size], "lr": 0.01}])
        >>> optimizer = flatmin.SQuAT(base, step_sizes=[size])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     levels = weight / size
        ...     quantized = ((levels.round() - levels).detach() + levels) * size  # rounds, with gradient 1
        ...     loss = (quantized - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    _uses_first = True  # what is clipped with all of it is shorter for what stands still in the step

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        step_sizes: Iterable[Tensor],
        rho: Rho = 0.05,
        period: int = 2,
        perturb: Literal["weights", "quantized"] = "weights",
        quantizers: Iterable[nn.Module] = (),
        scaling: Scaling | None = None,
        scaler: GradScaler | None = None,
        max_norm: float | None = None,
        when: Schedule | Callable[[int], bool] | None = None,
        model: nn.Module | None = None,
        same_randomness: bool = True,
        norm: Literal["rank", "global"] = "rank",
    ) -> None:
        self.period = check_integer("period", period, least=2)
        if perturb not in ("weights", "quantized"):
            raise InvalidArgumentError(f"perturb must be 'weights' or 'quantized', got {perturb!r}")
        self._after_rounding = perturb == "quantized"  # the argument's name is a method's
        self._quantizers = _checked_quantizers(quantizers, perturb, scaling, norm)
        super().__init__(
            base_optimizer,
            rho=rho,
            scaling=scaling,
            scaler=scaler,
            max_norm=max_norm,
            when=when,
            model=model,
            same_randomness=same_randomness,
            norm=norm,
        )
        self._sizes = _checked_sizes(step_sizes, self.base_optimizer)
        self._subset = {parameter for parameter in self._all() if parameter not in self._sizes}
        if not self._subset:
            raise InvalidArgumentError("step_sizes are all parameters of base_optimizer; give it the weights too")

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Makes one step, see `SharpnessAware.step`; step sizes stay above 0."""
        sizes = [size for size in self._sizes if size.requires_grad]
        before = clones(sizes)
        found = super().step(closure)
        with torch.no_grad():
            for size, old in zip(sizes, before, strict=True):
                size.copy_(torch.where((size > 0) | (old <= 0), size, old / 2))
        return found

    def _gradient(self, step: Step) -> Passes:
        learns = step.index % self.period == self.period - 1
        if learns:
            step.second_runs = False
        with _Quantized(self._quantizers).first() as quantized:
            yield from step.first_pass()
        if step.second_runs:
            if self._after_rounding:
                with quantized.second(step.rho):
                    yield from step.second_pass([], [])
            else:
                yield from step.second_pass()
        self._freeze(step, learns)

    def _freeze(self, step: Step, learns: bool) -> None:
        """Takes the gradient from what stands still in this step, so that the base optimizer leaves it out."""
        pairs = list(zip(step.parameters, step.gradients, strict=True))
        moving = [pair for pair in pairs if (pair[0] in self._sizes) == learns]
        if not moving:
            raise InvalidArgumentError(
                f"none of the {'step sizes' if learns else 'weights'} of SQuAT has a gradient, so that the step would "
                "move nothing; step_sizes must be those that the network's fake quantisers use"
            )
        for parameter, _ in pairs:
            if (parameter in self._sizes) != learns:
                parameter.grad = None
        step.parameters, step.gradients = [pair[0] for pair in moving], [pair[1] for pair in moving]

    def _all(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class _Quantized:
    """Quantised weights that are moved in the second pass, along their gradients in the first."""

    def __init__(self, quantizers: Sequence[nn.Module]) -> None:
        self._quantizers = quantizers
        self._gradients: dict[nn.Module, Tensor] = {}

    @contextmanager
    def first(self) -> Iterator["_Quantized"]:
        """Inside, the gradients of what the quantisers make are added up."""

        def seen(module: nn.Module, _: Any, made: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                known = self._gradients.get(module)
                self._gradients[module] = gradient.detach() if known is None else known + gradient

            if made.requires_grad:
                cast(Any, made).register_hook(add)

        with self._hooked(seen):
            yield self

    @contextmanager
    def second(self, rho: float) -> Iterator[None]:
        """Inside, what they make is moved by ``rho`` along those."""
        modules, gradients = list(self._gradients), list(self._gradients.values())
        if not modules:
            raise InvalidArgumentError(
                "quantizers: none of them was seen in the first pass, or makes what the loss depends on; give "
                "those of the network, and make the step with a closure or in a loop over passes(), not by perturb()"
            )
        norm = length(gradients)
        zeros = [torch.zeros_like(gradient) for gradient in gradients]
        offsets = dict(zip(modules, plus(zeros, gradients, alpha=rho / (norm + 1e-12)), strict=True))
        with self._hooked(lambda module, _, made: made + offsets[module] if module in offsets else made):
            yield

    @contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._quantizers:
                stack.callback(module.register_forward_hook(hook).remove)
            yield


def _checked_sizes(step_sizes: Iterable[Tensor], base: Optimizer) -> set[Tensor]:
    """Returns the step sizes as a set, if all of them are the base optimizer's."""
    try:
        found = check_subset(step_sizes, base)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            str(error)
            .replace("parameters", "step_sizes", 1)
            .replace("leave it out to perturb all", "give those that are")
        ) from None
    if found is None:
        raise InvalidArgumentError(
            "step_sizes must be several tensors, got None; for torchao's quantisers, "
            "flatmin.integrations.torchao.step_sizes(model)"
        )
    return found


def _checked_quantizers(
    quantizers: Iterable[nn.Module], perturb: str, scaling: Scaling | None, norm: str
) -> list[nn.Module]:
    if not isinstance(quantizers, Iterable) or isinstance(quantizers, Tensor):
        raise InvalidArgumentError(f"quantizers must be modules, got {type(quantizers).__name__}")
    found = list(quantizers)
    wrong = [type(each).__name__ for each in found if not isinstance(each, nn.Module)]
    if wrong:
        raise InvalidArgumentError(f"quantizers must be modules, got {wrong[0]}")
    if perturb == "weights":
        if found:
            raise InvalidArgumentError("quantizers are of use with perturb='quantized' alone; leave them out")
        return []
    if not found:
        raise InvalidArgumentError(
            "perturb='quantized' needs quantizers=, the modules that make quantised weights; for torchao's, "
            "flatmin.integrations.torchao.quantizers(model)"
        )
    if norm != "rank":
        raise InvalidArgumentError("norm must be 'rank' with perturb='quantized', whose gradients are never averaged")
    if scaling is not None:
        raise InvalidArgumentError("scaling: perturb='quantized' takes none, since it moves no parameter")
    return found
