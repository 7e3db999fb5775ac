"""The sharpness of saved runs: what ``flatmin sharpness`` does, from Python."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..._files import write_json
from ...errors import InvalidArgumentError, NoDirectionError
from ...sharpness import (
    Objective,
    SpectralDensity,
    average_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    sam_sharpness,
    spectral_density,
)
from ..problems.source import MEASURE
from ..results import SHARPNESS
from ..training.logged_sharpness import Batches, fixed_batches
from .measured import Location, OnWord, check_bounds, opened
from .record import command_line, environment
from .saved import Saved

NOTE = (
    "A method that softens predictions, as SAF, MESA and label smoothing do, raises the cross entropy and with it its "
    "raw sharpness, whatever the flatness of the minimum: compare the values of normalised logits beside the raw ones. "
    "Sharpness is no measure of generalisation (Andriushchenko et al. 2023)."
)


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
    check_bounds(rho=rho, samples=samples, eigenvalues=eigenvalues, seed=seed)
    saved = opened(run, device, trust_experiment)
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
