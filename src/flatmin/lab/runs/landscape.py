"""The loss around the minimum of saved runs: what ``flatmin landscape`` does, from Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..._files import write_json
from ...errors import InvalidArgumentError
from ...sharpness import Landscape, Objective, loss_landscape
from ..problems.source import MEASURE
from ..results import LANDSCAPE
from ..training.logged_sharpness import Batches, fixed_batches
from .measured import Location, check_bounds, opened
from .record import command_line, environment
from .saved import Saved

PARTIAL = "landscape.partial"

OnPoint = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RunLandscape:
    """What `measure_landscape` returns.

    Attributes:
        landscape: The grid and the loss on it.
        path: The file that was written.
        name: Of the run and, if it is not the newest, of the checkpoint.
        method: That the run was trained with.
        epoch: Epochs done at the checkpoint.
    """

    landscape: Landscape
    path: Path
    name: str
    method: str
    epoch: int


def measure_landscape(
    run: Location,
    *,
    points: int = 51,
    radius: float = 1.0,
    directions: int = 2,
    direction_seed: int = 0,
    through: Sequence[Location] | None = None,
    samples: int = 1024,
    seed: int = 0,
    float64: bool = False,
    train_mode: bool = False,
    device: str | None = None,
    trust_experiment: bool = False,
    on_progress: OnPoint | None = None,
) -> RunLandscape:
    """Finds the loss around the minimum of a saved run, and writes ``landscape.json`` into its folder.

    Along random, filter-normalised directions (Li et al. 2018), or in the plane through three runs (Garipov et al.
    2018). If it is interrupted, the same call continues where it was.

    Args:
        run: The folder of a run, for its newest checkpoint, or a checkpoint, or what `open_saved` returned.
        points: Along each axis, 2 or more; an odd number includes the minimum itself.
        radius: How far to go to each side, > 0, in lengths of the filters.
        directions: 1 for a curve, 2 for a surface.
        direction_seed: Draws the directions; use the same one for runs that are to be compared.
        through: Two more runs or checkpoints, for the plane through all three in place of random directions. Each
            point then normalises with each batch's own statistics, as with ``train_mode``.
        samples: Training samples to measure on, at most.
        seed: Draws the samples.
        float64: Compute in double precision.
        train_mode: Normalise with each batch's own statistics, as in training; all samples are then one batch.
        device: Where to measure. None: where the run was.
        trust_experiment: Whether an experiment file that lies in the run's folder may be run.
        on_progress: Called with the number of points done, of all, and the run's name.

    Returns:
        The landscape, and the path of the file.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        DataError: If there is no run, its checkpoint is of another, or ``landscape.partial`` in its folder is not of
            this landscape.
        ExperimentError: If the run's experiment file cannot be used, or is not to be trusted.
        NonFiniteLossError: If the loss at the origin is infinite or not a number.
        OutputError: If the file cannot be written.

    Example:
        A curve of 21 points for each of two runs, along the same direction::

            for run in ("runs/base", "runs/sam"):
                print(flatmin.lab.measure_landscape(run, points=21, directions=1).landscape.loss)
    """
    check_bounds(
        points=points,
        radius=radius,
        directions=directions,
        direction_seed=direction_seed,
        samples=samples,
        seed=seed,
    )
    others = [] if through is None else [through] if isinstance(through, (str, PathLike, Saved)) else list(through)
    if through is not None and len(others) != 2:
        raise InvalidArgumentError(
            f"through must be two more runs or checkpoints for a plane of three, got {through!r}"
        )
    saved = opened(run, device, trust_experiment)
    plane = [saved, *(opened(other, device, trust_experiment) for other in others)] if others else []
    # With their own statistics, the batches are as large as can be.
    size = samples if train_mode or plane else 1024
    return write_landscape(
        saved,
        fixed_batches(saved.problem, samples, seed, saved.device, batch_size=size),
        plane,
        seed,
        on_progress=on_progress,
        points=points,
        radius=radius,
        directions=directions,
        direction_seed=direction_seed,
        batch_statistics=train_mode,
        dtype=torch.float64 if float64 else None,
    )


def write_landscape(
    saved: Saved,
    batches: Batches,
    plane: Sequence[Saved] = (),
    seed: int = 0,
    *,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    on_progress: OnPoint | None = None,
    **options: Any,
) -> RunLandscape:
    """Finds the loss around a saved network, or in a plane through three, and writes it into the first one's folder.

    ``options`` are those of `loss_landscape`. See `measure_landscape` for the others.
    """
    partial = saved.folder / PARTIAL
    objective = Objective(
        saved.model, saved.loss_fn, batches, batch_statistics=batch_statistics or bool(plane), dtype=dtype, seed=seed
    )
    with saved.problem.source.calling(MEASURE):
        found = loss_landscape(
            objective,
            plane=[one.model.state_dict() for one in plane] if plane else None,
            partial=partial,
            on_progress=on_progress and (lambda done, total: on_progress(done, total, saved.name)),
            **options,
        )
    path = saved.folder / LANDSCAPE
    write_json(
        path,
        {
            "method": saved.run.method,
            "seed": saved.run.seed,
            "checkpoint_epoch": saved.epoch,
            **found.to_json(),
            "radius": options.get("radius", 1.0) if found.radius is None else found.radius,
            "checkpoints": [
                {"name": one.name, "x": x, "y": y} for one, (x, y) in zip(plane, found.places, strict=True)
            ],
            "data": {"set": "train", "samples": found.samples, "seed": seed},
            "command": command_line(),
            **environment(),
        },
    )
    partial.unlink(missing_ok=True)
    return RunLandscape(found, path, saved.name, saved.run.method, saved.epoch)
