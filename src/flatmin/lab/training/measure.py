"""Sharpness of a network that is trained or was: during training, and from a run's checkpoint."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from ..._rng import preserved
from ...errors import NonFiniteLossError
from ...sharpness import average_sharpness, hessian_eigenvalues, hessian_trace, sam_sharpness
from ..problems.problem import Problem, class_numbers

if TYPE_CHECKING:
    from .trainer import Trainer

Batches = list[tuple[Tensor, Tensor]]
LOGGED = 512  # training samples that sharpness is measured on during training
NOTE = (
    "A method that softens predictions, as SAF, MESA and label smoothing do, raises the cross entropy and with it its "
    "raw sharpness, whatever the flatness of the minimum: compare the values of normalised logits beside the raw ones. "
    "Sharpness is no measure of generalisation (Andriushchenko et al. 2023)."
)


def evaluated_network(trainer: "Trainer") -> nn.Module:
    """The network that is evaluated, with trainable weights: the one that is trained, or a copy with the average's."""
    if trainer.average is None:
        return trainer.model
    network = copy.deepcopy(trainer.model)
    network.load_state_dict(trainer.evaluated.state_dict())
    return network


def fixed_batches(problem: Problem, samples: int, seed: int, device: torch.device, batch_size: int = 256) -> Batches:
    """Draws training samples, at most all, and reads them as batches; random states stay as they are."""
    size = len(problem.train)  # type: ignore[arg-type]
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:samples].sort().values.tolist()
    with preserved(device):
        loader = DataLoader(Subset(problem.train, chosen), batch_size=batch_size)
        return [(x.to(device), class_numbers(y, problem.num_classes).to(device)) for x, y in loader]


def epoch_sharpness(trainer: "Trainer", lr: float) -> dict[str, float]:
    """What ``log_sharpness`` and ``log_curvature`` add to an epoch's metrics, where due. Training is not touched.

    Returns:
        ``sharpness`` (SAM's measure, rho .05, plain cross entropy, evaluation mode, on at most 512 training samples),
        ``sharpness_normalised`` (the same of normalised logits) and ``gradient_norm``; ``top_eigenvalue`` of the
        Hessian, to about 1 %, and ``lr_times_top_eigenvalue``. NaN where a loss is not finite.
    """
    recipe, done = trainer.run.recipe, trainer.epoch + 1

    def due(every: int) -> bool:
        return every > 0 and (done % every == 0 or done == recipe.epochs)

    if not (due(recipe.log_sharpness) or due(recipe.log_curvature)):
        return {}
    batches = fixed_batches(trainer.problem, LOGGED, 0, trainer.device)
    network = evaluated_network(trainer)
    found: dict[str, float] = {}
    if due(recipe.log_sharpness):
        found |= dict.fromkeys(("sharpness", "sharpness_normalised", "gradient_norm"), math.nan)
        with suppress(NonFiniteLossError):
            raw = sam_sharpness(network, F.cross_entropy, batches)
            normalised = sam_sharpness(network, F.cross_entropy, batches, normalise_logits=True)
            found |= {
                "sharpness": raw.value,
                "sharpness_normalised": normalised.value,
                "gradient_norm": raw.gradient_norm,
            }
    if due(recipe.log_curvature):
        top = math.nan
        with suppress(NonFiniteLossError):
            # Eight vectors find the top one to far less than the tolerance, in nine products of twenty-one.
            top = hessian_eigenvalues(network, F.cross_entropy, batches, tolerance=0.05, vectors=8).value
        found |= {"top_eigenvalue": top, "lr_times_top_eigenvalue": lr * top}
    return found


def measures(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Batches,
    *,
    rho: float = 0.05,
    eigenvalues: int = 1,
    trace: bool = False,
    on_progress: Callable[[str], None] = lambda word: None,
    **options: Any,
) -> dict[str, Any]:
    """Measures a network in all ways that can be compared, each on raw and on normalised logits.

    Args:
        model: The network.
        loss_fn: Of ``(logits, y)``, a mean.
        batches: What to measure on.
        rho: SAM's; the adaptive measure takes ten times as much, as ASAM does.
        eigenvalues: How many of the Hessian's largest, 0 for none.
        trace: Whether to estimate its trace.
        on_progress: Called with a word on what is going on.
        options: Of all measures, see `flatmin.sharpness`.

    Returns:
        ``measures``, ``eigenvalues`` (of raw logits) and ``loss``, as they stand in ``sharpness.json``.
    """
    found: list[dict[str, Any]] = []
    result: dict[str, Any] = {"measures": found, "eigenvalues": []}

    def add(name: str, logits: str, length: float | None, value: float, error: float | None = None) -> None:
        found.append({"name": name, "logits": logits, "rho": length, "value": value, "standard_error": error})

    for logits in ("raw", "normalised"):
        given: dict[str, Any] = {**options, "normalise_logits": logits == "normalised"}
        on_progress(f"sharpness, {logits} logits")
        plain = sam_sharpness(model, loss_fn, batches, rho=rho, **given)
        add("sam_sharpness", logits, rho, plain.value)
        adaptive = sam_sharpness(model, loss_fn, batches, rho=10 * rho, adaptive=True, **given)
        add("sam_sharpness_adaptive", logits, 10 * rho, adaptive.value)
        average = average_sharpness(model, loss_fn, batches, rho=rho, **given)
        add("average_sharpness", logits, rho, average.value, average.standard_error)
        add("gradient_norm", logits, None, plain.gradient_norm)
        if logits == "raw":
            result["loss"] = plain.loss
        if eigenvalues:
            on_progress(f"eigenvalues, {logits} logits")
            top = hessian_eigenvalues(model, loss_fn, batches, k=eigenvalues, **given)
            add("top_eigenvalue", logits, None, top.value)
            if logits == "raw":
                result["eigenvalues"] = list(top.eigenvalues)
        if trace:
            on_progress(f"trace, {logits} logits")
            whole = hessian_trace(model, loss_fn, batches, **given)
            add("hessian_trace", logits, None, whole.value, whole.standard_error)
    return result
