"""``flatmin landscape``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InvalidArgumentError
from ..results import LANDSCAPE
from ..results.files import check_path
from ..runs.landscape import PARTIAL, measure_landscape
from ..runs.measured import BOUNDS
from ..runs.saved import Saved, open_saved
from ._options import Debug, bounded, running_user_code
from ._shared import TrustExperiment, app, interruptible, state_of
from ._terminal import Display, out_console


@app.command()
def landscape(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their checkpoints.")],
    points: Annotated[int, bounded(BOUNDS["points"], help="Along each axis.")] = 51,
    radius: Annotated[float, bounded(BOUNDS["radius"], help="How far to each side, in lengths of the filters.")] = 1.0,
    directions: Annotated[int, bounded(BOUNDS["directions"], help="1 for a curve, 2 for a surface.")] = 2,
    direction_seed: Annotated[
        int, bounded(BOUNDS["direction_seed"], help="Draws the directions, the same for all runs.")
    ] = 0,
    plane: Annotated[bool, typer.Option("--plane", help="The plane through three runs or checkpoints.")] = False,
    samples: Annotated[int, bounded(BOUNDS["samples"], help="Training samples to measure on, at most.")] = 1024,
    seed: Annotated[int, bounded(BOUNDS["seed"], help="Draws the samples.")] = 0,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in double precision.")] = False,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Normalise with each batch's own statistics, as in training.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to measure.  [default: where the run was]")] = None,
    trust_experiment: TrustExperiment = False,
    debug: Debug = False,
) -> None:
    """Look at the loss around the minimum of each run, and write landscape.json into its folder.

    The directions are random and filter-normalised (Li et al. 2018). After Ctrl-C, the same command goes on where it
    was. With --plane, one landscape of the three goes into the first one's folder.
    """
    with running_user_code(debug):
        opened = [open_saved(check_path("run", run), device, trust_experiment=trust_experiment) for run in runs]
        if plane and len(opened) != 3:
            raise InvalidArgumentError(f"--plane goes through three runs or checkpoints, got {len(opened)}")
        wanted = opened[:1] if plane else opened
        with interruptible(_kept(wanted)):
            for saved in wanted:
                with Display(unit="points") as display:
                    found = measure_landscape(
                        saved,
                        points=points,
                        radius=radius,
                        directions=directions,
                        direction_seed=direction_seed,
                        through=opened[1:] if plane else None,
                        samples=samples,
                        seed=seed,
                        float64=float64,
                        train_mode=train_mode,
                        on_progress=display.tell,
                    )
                losses = [loss for row in found.landscape.loss for loss in (row if isinstance(row, tuple) else (row,))]
                out_console.print(
                    f"{found.name}, {found.method}: loss {found.landscape.origin_loss:.4g} at the minimum, "
                    f"{min(losses):.4g} to {max(losses):.4g} over {len(losses)} points; written to {found.path}",
                    markup=False,
                )


def _kept(wanted: Sequence[Saved]) -> Callable[[], str]:
    """Says what Ctrl-C has left."""
    states = [state_of(saved.folder / LANDSCAPE) for saved in wanted]

    def say() -> str:
        for saved in wanted:
            partial = saved.folder / PARTIAL
            if partial.exists():
                return f"what is done is kept in {partial}; the same command goes on with it"
        return "; ".join(state() for state in states)

    return say
