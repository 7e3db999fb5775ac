"""``flatmin compare``."""

import shlex
from typing import Annotated

import typer

from ... import _command
from ..comparison.asked import BOUNDS
from ..comparison.compare import compare as run_comparison
from ..methods import COMPARED, METHODS
from ..recipe import Recipe
from ..results.values import count_of
from ._options import bounded, parse_settings, with_options
from ._shared import Interrupted, app, interruptible
from ._terminal import Display, print_result

_COMPARED = ",".join(COMPARED)


@app.command()
@with_options
def compare(
    recipe: Recipe,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Methods to compare, with commas; base must be one: {', '.join(METHODS)}.  [default: {_COMPARED}]"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE[,VALUE...]",
            help="A hyperparameter of one method; each of several values makes a row. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, bounded(BOUNDS["seeds"], help="Seeds.  [default: as many as fit in --minutes, at least 5]")
    ] = None,
    select: Annotated[
        int | None,
        bounded(
            BOUNDS["select"],
            help="Compare only the best of each method's --set values, chosen first on a held-out fifth of the "
            "training set, with this many seeds of their own.",
        ),
    ] = None,
    look: Annotated[
        int,
        bounded(
            BOUNDS["look"],
            help="Also measure the sharpness of the first seed's networks, and the loss around them at this many "
            "points along each of two directions; 0: do not.",
        ),
    ] = 0,
    after: Annotated[
        bool,
        typer.Option(
            "--after",
            help="Also measure each network after training: its accuracy with fresh batch-norm statistics, with "
            "weights rounded to 8, 4, 3 and 2 bits, with noise on them, and after a short fine-tune on inputs whose "
            "sign is changed, or by EXPERIMENT's shift(x).",
        ),
    ] = False,
    minutes: Annotated[float, bounded(BOUNDS["minutes"], help="Time for everything, if --seeds is not given.")] = 3.0,
    jobs: Annotated[
        int | None, bounded(BOUNDS["jobs"], help="Runs at a time.  [default: one a core; one on an accelerator]")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the comparison; one that was ended goes on.  [default: a new one under runs/]"),
    ] = None,
) -> None:
    """Compare methods on the same splits, initial weights and batches, seed by seed.

    Prints the test accuracy after the last epoch, its paired difference to the base optimizer, both with a 95 %
    confidence interval, and what each method costs. EXPERIMENT, a Python file that defines model(), train_set() and
    test_set(), replaces --data and --model: does it help on my problem, and what does it cost? With flatmin[report]
    installed, the folder also gets report.html, the same and more for a browser.
    """
    settings = parse_settings(set_ or [])
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    with Display() as display, interruptible(lambda: "nothing was done"):
        result = run_comparison(
            recipe,
            methods=names,
            settings=settings,
            seeds=seeds,
            select=select,
            look=look,
            after=after,
            minutes=minutes,
            jobs=jobs,
            out=out,
            on_progress=display.tell,
        )
    print_result(result)
    if result.interrupted:
        go_on = f"the same command with --out {shlex.quote(str(result.folder))} goes on"
        raise Interrupted(f"{count_of(len(result.seeds), 'seed')} finished, kept in {result.folder}; {go_on}")
    if _command.interrupted():  # after the comparison itself, of which a warning has told
        raise typer.Exit(2)
