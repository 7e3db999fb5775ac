"""Sharpness and loss landscapes of saved runs: what ``flatmin sharpness`` and ``flatmin landscape`` do, from Python."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..._checks import Bounds
from ..._files import write_json
from ...errors import InvalidArgumentError, NoDirectionError
from ...sharpness import (
    Landscape,
    Objective,
    SpectralDensity,
    average_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    loss_landscape,
    sam_sharpness,
    spectral_density,
)
from ..problems.source import MEASURE
from ..recipe import SEED
from ..results import LANDSCAPE, SHARPNESS
from ..results.files import check_path
from ..training.logged_sharpness import Batches, fixed_batches
from .record import command_line, environment
from .saved import Saved, open_saved

PARTIAL = "landscape.partial"
BOUNDS = {  # of the arguments of what follows, and of the command's options
    "rho": Bounds(above=0, most=1e18),
    "samples": Bounds(integer=True, least=1),
    "seed": SEED,
    "eigenvalues": Bounds(integer=True, least=0, most=1000),
    "points": Bounds(integer=True, least=2, most=10_000),
    "radius": Bounds(above=0),
    "directions": Bounds(integer=True, least=1, most=2),
    "direction_seed": SEED,
}
NOTE = (
    "A method that softens predictions, as SAF, MESA and label smoothing do, raises the cross entropy and with it its "
    "raw sharpness, whatever the flatness of the minimum: compare the values of normalised logits beside the raw ones. "
    "Sharpness is no measure of generalisation (Andriushchenko et al. 2023)."
)

Location = str | PathLike[str] | Saved  # where a run is, or what `open_saved` returned
OnWord = Callable[[str], None]
OnPoint = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Measure:
    """One number that says how sharp a minimum is.

    Attributes:
        name: Such as ``"sam_sharpness"``.
        logits: ``"raw"`` or ``"normalised"``.
        rho: Length of the step; None for measures that make none.
        value: The number.
        standard_error: Of ``value``, if it is an estimate.
    """

    name: str
    logits: str
    rho: float | None
    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Measures:
    """What `measures` returns.

    Attributes:
        loss: Of raw logits, at the network's weights.
        measures: All of raw logits, then the same of normalised ones, if these can be measured.
        eigenvalues: The largest of the Hessian, of raw logits.
    """

    loss: float
    measures: tuple[Measure, ...]
    eigenvalues: tuple[float, ...]


@dataclass(frozen=True)
class RunSharpness(Measures):
    """What `measure_sharpness` returns.

    Attributes:
        loss: Of raw logits, at the network's weights.
        measures: All of raw logits, then the same of normalised ones, if these can be measured.
        eigenvalues: The largest of the Hessian, of raw logits.
        density: The density of its eigenvalues, of raw logits, if it was asked for.
        samples: Number of training samples measured on.
        path: The file that was written.
        name: Of the run and, if it is not the newest, of the checkpoint.
        method: That the run was trained with.
        epoch: Epochs done at the checkpoint.
    """

    density: SpectralDensity | None
    samples: int
    path: Path
    name: str
    method: str
    epoch: int


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


def measure_sharpness(
    run: Location,
    *,
    rho: float = 0.05,
    samples: int = 1024,
    seed: int = 0,
    eigenvalues: int = 1,
    trace: bool = False,
    density: bool = False,
    float64: bool = False,
    train_mode: bool = False,
    device: str | None = None,
    trust_experiment: bool = False,
    on_progress: OnWord | None = None,
) -> RunSharpness:
    """Measures how sharp the minimum of a saved run is, and writes ``sharpness.json`` into its folder.

    Every measure is taken on raw and on normalised logits, since softer or harder predictions change the first
    whatever the minimum is like. Logits of fewer than three classes cannot be normalised, so those measures are absent.

    Args:
        run: The folder of a run, for its newest checkpoint, or a checkpoint, or what `open_saved` returned.
        rho: Length of SAM's step, > 0; the adaptive measure takes ten times as much.
        samples: Training samples to measure on, at most.
        seed: Draws samples, directions and vectors.
        eigenvalues: How many of the Hessian's largest; 0 for none.
        trace: Estimate the Hessian's trace.
        density: Find the density of its eigenvalues; slow.
        float64: Compute in double precision.
        train_mode: Normalise with each batch's own statistics, as in training.
        device: Where to measure. None: where the run was.
        trust_experiment: Whether an experiment file that lies in the run's folder may be run.
        on_progress: Called with a word on what is going on.

    Returns:
        The measures, and the path of the file.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.
        DataError: If there is no run, or its checkpoint is of another.
        ExperimentError: If the run's experiment file cannot be used, or is not to be trusted.
        NonFiniteLossError: If a loss or a derivative is infinite or not a number.
        OutputError: If the file cannot be written.

    Example:
        Compare two runs by SAM's sharpness with normalised logits::

            for run in ("runs/base", "runs/sam"):
                found = flatmin.lab.measure_sharpness(run)
                print(found.name, {each.name: each.value for each in found.measures if each.logits == "normalised"})
    """
    for name, value in {"rho": rho, "samples": samples, "eigenvalues": eigenvalues, "seed": seed}.items():
        BOUNDS[name].check(name, value)
    saved = _opened(run, device, trust_experiment)
    weights = sum(parameter.numel() for parameter in saved.model.parameters() if parameter.requires_grad)
    if eigenvalues >= weights:
        raise InvalidArgumentError(f"eigenvalues must be less than the number of weights, {weights}, got {eigenvalues}")
    return write_sharpness(
        saved,
        fixed_batches(saved.problem, samples, seed, saved.device),
        rho=rho,
        seed=seed,
        eigenvalues=eigenvalues,
        trace=trace,
        density={} if density else None,
        batch_statistics=train_mode,
        dtype=torch.float64 if float64 else None,
        on_progress=on_progress,
    )


def check_landscape(**options: float) -> None:
    """Checks options of `measure_landscape`, before any run is opened.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of its `BOUNDS`.
    """
    for name, value in options.items():
        BOUNDS[name].check(name, value)


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
    check_landscape(
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
    saved = _opened(run, device, trust_experiment)
    plane = [saved, *(_opened(other, device, trust_experiment) for other in others)] if others else []
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


def measures(
    objective: Objective,
    *,
    rho: float = 0.05,
    eigenvalues: int = 1,
    trace: bool = False,
    on_progress: OnWord | None = None,
) -> Measures:
    """Measures a network in all ways that can be compared, each on raw and on normalised logits.

    Where logits cannot be normalised, as those of two classes, the measures of raw ones are all there are.

    Args:
        objective: What to measure; whether it normalises logits does not matter.
        rho: SAM's; the adaptive measure takes ten times as much, as ASAM does.
        eigenvalues: How many of the Hessian's largest, 0 for none.
        trace: Whether to estimate its trace.
        on_progress: Called with a word on what is going on.
    """
    tell = on_progress or (lambda word: None)
    found: list[Measure] = []
    loss = 0.0
    largest: tuple[float, ...] = ()
    for logits in ("raw", "normalised"):
        now = objective.variant(normalise_logits=logits == "normalised")
        tell(f"sharpness, {logits} logits")
        try:
            plain = sam_sharpness(now, rho=rho)
        except NoDirectionError:
            break
        found.append(Measure("sam_sharpness", logits, rho, plain.value))
        adaptive = sam_sharpness(now, rho=10 * rho, adaptive=True)
        found.append(Measure("sam_sharpness_adaptive", logits, 10 * rho, adaptive.value))
        average = average_sharpness(now, rho=rho)
        found.append(Measure("average_sharpness", logits, rho, average.value, average.standard_error))
        found.append(Measure("gradient_norm", logits, None, plain.gradient_norm))
        if logits == "raw":
            loss = plain.loss
        if eigenvalues:
            tell(f"eigenvalues, {logits} logits")
            top = hessian_eigenvalues(now, k=eigenvalues)
            found.append(Measure("top_eigenvalue", logits, None, top.value))
            if logits == "raw":
                largest = top.eigenvalues
        if trace:
            tell(f"trace, {logits} logits")
            whole = hessian_trace(now)
            found.append(Measure("hessian_trace", logits, None, whole.value, whole.standard_error))
    return Measures(loss, tuple(found), largest)


def write_sharpness(
    saved: Saved,
    batches: Batches,
    *,
    seed: int = 0,
    density: Mapping[str, Any] | None = None,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    rho: float = 0.05,
    eigenvalues: int = 1,
    trace: bool = False,
    on_progress: OnWord | None = None,
) -> RunSharpness:
    """Measures a saved network, see `measures`, and writes what was found into its run's folder.

    ``density`` are the options of `spectral_density`; None for none. See `measure_sharpness` for the others.
    """
    objective = Objective(
        saved.model, saved.loss_fn, batches, batch_statistics=batch_statistics, dtype=dtype, seed=seed
    )
    spectrum = None
    with saved.problem.source.calling(MEASURE):
        found = measures(objective, rho=rho, eigenvalues=eigenvalues, trace=trace, on_progress=on_progress)
        if density is not None:
            if on_progress is not None:
                on_progress("density of the eigenvalues")
            spectrum = spectral_density(objective, **density)
    path = saved.folder / SHARPNESS
    write_json(
        path,
        {
            "method": saved.run.method,
            "seed": saved.run.seed,
            "checkpoint": saved.name,
            "checkpoint_epoch": saved.epoch,
            "data": {"set": "train", "samples": objective.samples, "seed": seed},
            "batch_statistics": batch_statistics,
            "dtype": str(dtype or torch.float32).removeprefix("torch."),
            "measures": [asdict(each) for each in found.measures],
            "eigenvalues": found.eigenvalues,
            "loss": found.loss,
            "spectral_density": spectrum
            and {"grid": spectrum.grid, "density": spectrum.density, "width": spectrum.width},
            "note": NOTE,
            "command": command_line(),
            **environment(),
        },
    )
    return RunSharpness(
        found.loss,
        found.measures,
        found.eigenvalues,
        spectrum,
        objective.samples,
        path,
        saved.name,
        saved.run.method,
        saved.epoch,
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


def _opened(run: Location, device: str | None, trust_experiment: bool) -> Saved:
    """What a run's location stands for."""
    if not isinstance(run, Saved):
        return open_saved(check_path("run", run), device, trust_experiment=trust_experiment)
    if device is not None:
        raise InvalidArgumentError(f"device={device!r} is for a path; give it to open_saved, since the run is open")
    return run
