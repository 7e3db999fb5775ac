"""The loss around a minimum, along random directions or in the plane through three checkpoints.

*Visualizing the Loss Landscape of Neural Nets*, Li et al., NeurIPS 2018, arXiv 1712.09913: random Gaussian directions,
filter-normalised so that networks of different scale can be compared. *Loss Surfaces, Mode Connectivity, and Fast
Ensembling of DNNs*, Garipov et al., NeurIPS 2018, arXiv 1802.10026: the plane through three networks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._checks import SEED, Bounds, check_function, check_integer, check_path
from ..errors import InvalidArgumentError
from ._directions import Axes, plane_axes, random_axes
from ._objective import Objective, measure
from ._partial import Partial, fingerprint
from ._result import Result
from ._snapshot import Snapshot, check_finite

MOST_POINTS = 10_000  # along an axis
SAVE_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Landscape(Result):
    """What `loss_landscape` returns.

    Attributes:
        kind: ``"random"`` or ``"plane"``.
        x: Coordinates along the first direction.
        y: Along the second; None for one direction.
        loss: A row for each of ``y`` and in it a number for each of ``x``; for one direction a number for each of
            ``x``. Far from the minimum it may be infinite or not a number.
        origin_loss: At the origin: the model's own weights, or the first checkpoint.
        places: Where in a plane the three checkpoints lie, as ``(x, y)``.
        samples: How many were measured on.
        radius: As given; None in a plane.
        direction_seed: As given; None in a plane.
        normalise_logits: As given.
    """

    kind: str
    x: tuple[float, ...]
    y: tuple[float, ...] | None
    loss: tuple[float, ...] | tuple[tuple[float, ...], ...]
    origin_loss: float
    places: tuple[tuple[float, float], ...]
    samples: int
    radius: float | None
    direction_seed: int | None
    normalise_logits: bool


@measure
def loss_landscape(
    objective: Objective,
    *,
    points: int = 51,
    radius: float = 1.0,
    directions: int = 2,
    direction_seed: int = 0,
    plane: Sequence[Mapping[str, Tensor]] | None = None,
    margin: float = 0.2,
    partial: str | PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """The loss on a grid around a minimum. Costs a forward pass over the batches for each point.

    Along random, filter-normalised directions (Li et al. 2018, arXiv 1712.09913), or in the plane through three
    networks (Garipov et al. 2018, arXiv 1802.10026). The points are taken one by one: on the demo's network, batching
    over them (``torch.func.vmap``) took twice as long, since its convolutions become grouped ones.

    Args:
        objective: What to measure. For a plane it needs ``batch_statistics=True`` if the model has batch-norm layers,
            since the averaged statistics of one network are wrong for another; use large batches.
        points: Along each axis, 2 or more; an odd number includes the minimum itself.
        radius: How far to go to each side, > 0; 1 is the length of each filter.
        directions: 1 or 2 random ones, orthogonal. Each filter (row of a weight of two dimensions or more) of a
            direction has the length of the model's filter; biases and normalisation layers stand still.
        direction_seed: Draws the directions; use the same one for networks that are to be compared.
        plane: The state dicts of three networks like the model, for the plane through them in place of random
            directions.
        margin: How far the plane goes beyond the three, as a share of the longer side.
        partial: A file for the points that are done, written every ten seconds and when something ends the work early;
            what is in it already is not done again. It stays: remove it when the landscape is stored.
        on_progress: Called with the number of points done and of all.

    Returns:
        The grid and the loss on it.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        NonFiniteLossError: If the loss at the origin is infinite or not a number.
        DataError: If ``partial`` is of another landscape.
        OutputError: If it cannot be written.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> objective = Objective(model, torch.nn.functional.mse_loss, [(torch.ones(2, 1), torch.zeros(2, 1))])
        >>> found = loss_landscape(objective, points=3, directions=1)  # at weights 0, 3 and 6
        >>> found.x, sorted(found.loss)
        ((-1.0, 0.0, 1.0), [0.0, 9.0, 36.0])
    """
    Bounds(integer=True, least=2, most=MOST_POINTS).check("points", points)
    radius = Bounds(above=0).check("radius", radius)
    if check_integer("directions", directions, least=1) > 2:
        raise InvalidArgumentError(f"directions must be 1 or 2, got {directions}")
    SEED.check("direction_seed", direction_seed)
    Bounds(least=0).check("margin", margin)
    path = check_path("partial", partial)
    if on_progress is not None:
        check_function("on_progress", on_progress, "of the points done and of all", otherwise=", or None")
    if plane is not None and not objective.batch_statistics and _averages_statistics(objective.model):
        raise InvalidArgumentError(
            "a plane needs the Objective's batch_statistics=True, since the averaged statistics of one network's "
            "batch-norm layers are wrong for another: take objective.variant(batch_statistics=True)"
        )
    with objective._snapshot() as loss:
        loss.check_changes()
        if plane is None:
            axes = random_axes(loss, count=directions, points=points, radius=radius, seed=direction_seed)
        else:
            axes = plane_axes(loss, plane, points=points, margin=margin)
        origin = check_finite("the loss at the origin", loss.loss(axes.origin))
        key = fingerprint(
            [axes.origin, *axes.directions, *loss.buffers.values()],
            *(axes.x, axes.y, loss.samples, objective.normalise_logits, objective.batch_statistics),
        )
        done = Partial(path, key, origin)
        _fill(loss, axes, done, on_progress or (lambda done, total: None))
        width = len(axes.x)
        rows = tuple(tuple(done.losses[start : start + width]) for start in range(0, len(done.losses), width))
        return Landscape(
            "random" if plane is None else "plane",
            axes.x,
            axes.y,
            rows[0] if axes.y is None else rows,
            origin,
            axes.places,
            loss.samples,
            radius if plane is None else None,
            direction_seed if plane is None else None,
            objective.normalise_logits,
        )


def _averages_statistics(model: nn.Module) -> bool:
    """Whether a layer of the model normalises with averaged statistics in evaluation mode."""
    return any(isinstance(module, _NormBase) and module.running_mean is not None for module in model.modules())


def _fill(loss: Snapshot, axes: Axes, done: Partial, on_progress: Callable[[int, int], None]) -> None:
    total = len(axes.x) * len(axes.y or (0.0,))
    saved = time.monotonic()
    along, *across = axes.directions
    try:
        while len(done.losses) < total:
            row, column = divmod(len(done.losses), len(axes.x))
            weights = axes.origin.add(along, alpha=axes.x[column])
            if axes.y is not None:
                weights.add_(across[0], alpha=axes.y[row])
            done.losses.append(loss.loss(weights))
            on_progress(len(done.losses), total)
            if time.monotonic() - saved > SAVE_EVERY:
                done.save()
                saved = time.monotonic()
    finally:
        done.save()
