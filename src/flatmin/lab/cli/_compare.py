"""``flatmin compare``."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import InvalidArgumentError
from ..comparison.outcome import make_rows
from ..comparison.run import Comparison
from ..comparison.select import select as select_rows
from ..methods.registry import COMPARED
from ..problems.load import has_criterion
from ..recipe import Recipe
from ..runs.record import run_folder
from ..runs.saved import open_saved
from ..training import torchrun
from ..training.measure import LOGGED, fixed_batches
from ._landscape import write_landscape
from ._options import parse_settings, with_options
from ._report import report_on
from ._shared import Interrupted, app, warn_if_idle
from ._sharpness import write_sharpness
from ._terminal import Display, err_console, print_outcome

_COMPARED = ",".join(COMPARED)
LOOKING = 0.2  # share of the time that is left for sharpness and landscapes, where they are wanted


@app.command()
@with_options
def compare(
    recipe: Recipe,
    methods: Annotated[
        str | None, typer.Option(help=f"Methods to compare, with commas; base must be one.  [default: {_COMPARED}]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE[,VALUE...]",
            help="A hyperparameter of one method; several values make a row each. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds.  [default: as many as fit in --minutes, at least 5]", min=1)
    ] = None,
    select: Annotated[
        int | None,
        typer.Option(
            help="Compare only the best of each method's --set values, chosen beforehand on a fifth of the training "
            "set that is held out, by so many seeds of their own.",
            min=1,
        ),
    ] = None,
    look: Annotated[
        int,
        typer.Option(
            help="Also measure the sharpness of the first seed's networks, and the loss around them at so many points "
            "along each of two directions; 0 for not.",
            min=0,
        ),
    ] = 0,
    minutes: Annotated[float, typer.Option(help="Time for all, where --seeds is not given.", min=0.1)] = 3.0,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time.  [default: one a core; one on an accelerator]", min=1)
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the comparison.  [default: a new one under runs/]")] = None,
) -> None:
    """Compare methods on the same splits, initial weights and batches, seed by seed.

    Prints the test accuracy after the last epoch, its paired difference to the base optimizer, both with a 95 %
    confidence interval, and what each method costs. EXPERIMENT, a Python file that defines model(), train_set() and
    test_set(), takes the place of --data and --model: does it help on my problem, and what does it cost? With
    flatmin[report] installed, the folder also gets report.html, the same and more for a browser.
    """
    if torchrun.launched() > 1:
        raise InvalidArgumentError("compare starts processes of its own: run it without torchrun, with --jobs")
    if look == 1:
        raise InvalidArgumentError("look takes two points along each direction at least, got 1")
    if select is not None and recipe.validation > 0:
        raise InvalidArgumentError("select holds samples out by itself: leave out --validation, or --select")
    names = _default_methods(recipe) if methods is None else [name.strip() for name in methods.split(",")]
    rows = make_rows(names, parse_settings(set_ or []), epochs=recipe.epochs)
    if select is not None and len(rows) == len(names):
        raise InvalidArgumentError(
            "select has nothing to choose from: give several values, --set saf.coefficient=0.3,0.8"
        )
    with run_folder(out, "compare") as folder:
        for row in rows:
            warn_if_idle(row.label, row.settings, recipe.epochs)
        with Display() as display:
            selection = None
            if select is not None:
                rows, selection = select_rows(
                    recipe, rows, folder / "selection", seeds=select, jobs=jobs, on_progress=display.tell
                )
            comparison = Comparison(
                recipe,
                rows,
                folder,
                seeds=seeds,
                selection=selection,
                minutes=(1 - LOOKING) * minutes if look else minutes,
                jobs=jobs,
                on_progress=display.tell,
            )
            outcome = comparison.run()
            if look and not outcome.interrupted:
                for row in rows:
                    _look_at(comparison.run_folder(row, outcome.seeds[0]), look, display)
        page = report_on(folder) if outcome.seeds else None
        print_outcome(outcome, folder / "results.json", page)
        if outcome.interrupted:
            kept = f"kept in {folder}" if any(folder.rglob("metrics.jsonl")) else "no epoch was done"
            raise Interrupted(f"{len(outcome.seeds)} seeds are finished, {kept}")


def _look_at(folder: Path, points: int, display: Display) -> None:
    """Measures sharpness and landscape of a run's network, for the report."""
    saved = open_saved(folder)
    batches = fixed_batches(saved.problem, LOGGED, 0, saved.device)
    display.tell(0, 0, f"sharpness of {saved.name}")
    rough = {"probes": 1, "steps": 32}
    write_sharpness(saved, batches, seed=0, density=rough, on_progress=lambda word: None)
    write_landscape(saved, batches, [], 0, points=points, on_progress=display.tell)


def _default_methods(recipe: Recipe) -> list[str]:
    """Those compared by default; without label smoothing where it cannot be, on a criterion of the user's own."""
    if not has_criterion(recipe):
        return list(COMPARED)
    err_console.print(f"{recipe.experiment} has its own criterion(), so smoothing is left out", markup=False)
    return [name for name in COMPARED if name != "smoothing"]
