"""``flatmin sharpness``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ...sharpness import spectral_density
from ..runs.record import command_line, environment, write_json
from ..runs.saved import Saved, open_saved
from ..training.measure import NOTE, Batches, fixed_batches, measures
from ._shared import app
from ._terminal import Display, out_console


@app.command()
def sharpness(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or one of its checkpoints.")],
    rho: Annotated[float, typer.Option(help="Length of SAM's step; the adaptive measure takes ten times it.")] = 0.05,
    samples: Annotated[int, typer.Option(help="Training samples to measure on, at most.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Draws samples, directions and vectors.", min=0)] = 0,
    eigenvalues: Annotated[int, typer.Option(help="How many of the Hessian's largest; 0 for none.", min=0)] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Estimate the Hessian's trace.")] = False,
    density: Annotated[bool, typer.Option("--density", help="Find the density of its eigenvalues; slow.")] = False,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in double precision.")] = False,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Normalise with each batch's own statistics, as in training.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to measure.  [default: where the run was]")] = None,
) -> None:
    """Measure how sharp the minimum is that a run has come to, and write sharpness.json into its folder.

    Every measure is taken on raw and on normalised logits, since predictions that are softer or harder change the
    first whatever the minimum is like.
    """
    saved = open_saved(run, device)
    batches = fixed_batches(saved.problem, samples, seed, saved.device)
    options: dict[str, Any] = {
        "batch_statistics": train_mode,
        "dtype": torch.float64 if float64 else None,
        "seed": seed,
    }
    with Display() as display:
        path, found = write_sharpness(
            saved,
            batches,
            rho=rho,
            eigenvalues=eigenvalues,
            trace=trace,
            density={} if density else None,
            on_progress=lambda word: display.tell(0, 0, word),
            **options,
        )
    out_console.print(
        f"{saved.name}, {saved.run.method}, after {saved.epoch} epochs: loss {found['loss']:.4g} on "
        f"{found['data']['samples']} training samples",
        markup=False,
    )
    table = Table("measure")
    for heading in ("rho", "raw logits", "normalised logits"):
        table.add_column(heading, justify="right", no_wrap=True)
    half = len(found["measures"]) // 2
    for raw, same in zip(found["measures"][:half], found["measures"][half:], strict=True):
        length = "" if raw["rho"] is None else f"{raw['rho']:g}"
        table.add_row(raw["name"].replace("_", " "), length, _say(raw), _say(same))
    out_console.print(table, soft_wrap=False)
    out_console.print(NOTE, markup=False)
    out_console.print(f"written to {path}", markup=False)


def write_sharpness(
    saved: Saved,
    batches: Batches,
    *,
    seed: int,
    density: Mapping[str, Any] | None,
    batch_statistics: bool = False,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[str], None],
    **how: Any,
) -> tuple[Path, dict[str, Any]]:
    """Measures a saved network, see `measures`, and writes what was found into its run's folder.

    ``density`` are the options of `spectral_density`; None for none.
    """
    options: dict[str, Any] = {"batch_statistics": batch_statistics, "dtype": dtype, "seed": seed}
    found = measures(saved.model, saved.loss_fn, batches, on_progress=on_progress, **how, **options)
    spectrum = None
    if density is not None:
        on_progress("density of the eigenvalues")
        full = spectral_density(saved.model, saved.loss_fn, batches, **density, **options)
        spectrum = {"grid": list(full.grid), "density": list(full.density), "width": full.width}
    path = saved.folder / "sharpness.json"
    whole = {
        "method": saved.run.method,
        "seed": saved.run.seed,
        "checkpoint": saved.name,
        "checkpoint_epoch": saved.epoch,
        "data": {"set": "train", "samples": sum(len(y) for _, y in batches), "seed": seed},
        "batch_statistics": batch_statistics,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        **found,
        "spectral_density": spectrum,
        "note": NOTE,
        "command": command_line(),
        **environment(),
    }
    write_json(path, whole)
    return path, whole


def _say(measure: dict[str, Any]) -> str:
    error = measure["standard_error"]
    return f"{measure['value']:.4g}" + ("" if error is None else f" (s.e. {error:.2g})")
