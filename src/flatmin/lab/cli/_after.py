"""``flatmin after``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..results import AFTER_FILE
from ..results.after import AFTER
from ..results.files import check_path
from ..runs.after import measure_after
from ..runs.saved import Saved, open_saved
from ._options import Debug, running_user_code
from ._shared import TrustExperiment, app, interruptible, state_of
from ._terminal import Display, out_console, print_table


@app.command()
def after(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their checkpoints.")],
    device: Annotated[str | None, typer.Option(help="Where to measure.  [default: where the run was]")] = None,
    trust_experiment: TrustExperiment = False,
    debug: Debug = False,
) -> None:
    """Measure what is left of each run's network after training, and write after.json into its folder.

    Its accuracy with batch-norm statistics made anew, with weights rounded to 8, 4, 3 and 2 bits, with noise on them,
    and after a short fine-tune on inputs whose sign is changed, or by the experiment file's shift(x).
    """
    table = [["after training, test accuracy %", *AFTER.values()]]
    with running_user_code(debug):
        opened = [open_saved(check_path("run", run), device, trust_experiment=trust_experiment) for run in runs]
        with interruptible(_kept(opened)), Display() as display:
            for saved in opened:
                found = measure_after(saved, on_progress=lambda word: display.tell(0, 0, word))
                accuracies = (f"{100 * found.test_accuracy[name]:.2f}" for name in AFTER)
                table.append([f"{found.name}, {found.method}", *accuracies])
    print_table(table)
    for saved in opened:
        out_console.print(f"written to {saved.folder / AFTER_FILE}", markup=False)


def _kept(opened: Sequence[Saved]) -> Callable[[], str]:
    """Says what Ctrl-C has left."""
    states = [state_of(saved.folder / AFTER_FILE) for saved in opened]
    return lambda: "; ".join(state() for state in states)
