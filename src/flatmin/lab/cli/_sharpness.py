"""``flatmin sharpness``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..results import SHARPNESS
from ..results.files import check_path
from ..runs.measured import BOUNDS
from ..runs.resume import find_run
from ..runs.sharpness import NOTE, Measure, measure_sharpness
from ._options import Debug, bounded, running_user_code
from ._shared import TrustExperiment, app, interruptible, state_of
from ._terminal import Display, out_console


@app.command()
def sharpness(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or one of its checkpoints.")],
    rho: Annotated[
        float, bounded(BOUNDS["rho"], help="Length of SAM's step; the adaptive measure takes ten times it.")
    ] = 0.05,
    samples: Annotated[int, bounded(BOUNDS["samples"], help="Training samples to measure on, at most.")] = 1024,
    seed: Annotated[int, bounded(BOUNDS["seed"], help="Draws samples, directions and vectors.")] = 0,
    eigenvalues: Annotated[
        int,
        bounded(BOUNDS["eigenvalues"], help="How many of the Hessian's largest, fewer than weights; 0 for none."),
    ] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Estimate the Hessian's trace.")] = False,
    density: Annotated[bool, typer.Option("--density", help="Find the density of its eigenvalues; slow.")] = False,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in double precision.")] = False,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Normalise with each batch's own statistics, as in training.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to measure.  [default: where the run was]")] = None,
    trust_experiment: TrustExperiment = False,
    debug: Debug = False,
) -> None:
    """Measure how sharp the minimum of a run is, and write sharpness.json into its folder.

    Every measure is taken on raw and on normalised logits, since softer or harder predictions change the first
    whatever the minimum is like.
    """
    place = find_run(check_path("run", run))[0] / SHARPNESS
    with running_user_code(debug), Display() as display, interruptible(state_of(place)):
        found = measure_sharpness(
            run,
            rho=rho,
            samples=samples,
            seed=seed,
            eigenvalues=eigenvalues,
            trace=trace,
            density=density,
            float64=float64,
            train_mode=train_mode,
            device=device,
            trust_experiment=trust_experiment,
            on_progress=lambda word: display.tell(0, 0, word),
        )
    out_console.print(
        f"{found.name}, {found.method}, after {found.epoch} epochs: loss {found.loss:.4g} on "
        f"{found.samples} training samples",
        markup=False,
    )
    table = Table()
    table.add_column("measure", no_wrap=True)
    for heading in ("rho", "raw logits", "normalised logits"):
        table.add_column(heading, justify="right", no_wrap=True)
    normalised = {each.name: each for each in found.measures if each.logits == "normalised"}
    for raw in found.measures:
        if raw.logits == "raw":
            length = "" if raw.rho is None else f"{raw.rho:g}"
            same = normalised.get(raw.name)
            table.add_row(raw.name.replace("_", " "), length, _say(raw), "-" if same is None else _say(same))
    out_console.print(table, soft_wrap=False)
    if not normalised:
        out_console.print("Logits of fewer than three classes, or all equal, cannot be normalised.", markup=False)
    out_console.print(NOTE, markup=False)
    out_console.print(f"written to {found.path}", markup=False)


def _say(measure: Measure) -> str:
    error = measure.standard_error
    return f"{measure.value:.4g}" + ("" if error is None else f" (s.e. {error:.2g})")
