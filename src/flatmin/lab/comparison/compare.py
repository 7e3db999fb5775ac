"""Compare methods on the same splits, initial weights and batches, and say what that means."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import FlatminWarning, InvalidArgumentError
from ..recipe import Recipe, as_recipe
from ..results import RESULTS, SELECTION, ComparisonResult
from ..results.files import check_path
from ..results.values import is_diverged
from ..runs.folder import holds_work
from ..runs.train import RunInterrupted, warn_if_idle
from ..training import torchrun
from .asked import asked_rows, check_numbers
from .begun import comparison_folder, find_begun
from .look import OnProgress, look_at
from .main_guard import check_main_guard
from .run import Comparison
from .select import select as select_rows

LOOKING = 0.2  # share of the time that is left for sharpness and landscapes, where they are wanted


def compare(
    recipe: "Recipe | str | PathLike[str] | None" = None,
    *,
    methods: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int | None = None,
    select: int | None = None,
    look: int = 0,
    after: bool = False,
    minutes: float = 3.0,
    jobs: int | None = None,
    out: "str | PathLike[str] | None" = None,
    on_progress: OnProgress | None = None,
) -> ComparisonResult:
    """Compares methods on the same splits, initial weights and batches, seed by seed, as ``flatmin compare`` does.

    Each method is trained with each seed; what counts is the test accuracy after the last epoch, its difference to the
    base paired by seed, and what a step costs. Everything is kept in a folder: ``results.json``, each run, and with
    ``flatmin[report]`` installed a page for the browser. The result prints as a table with the verdict below.

    It starts processes that import the calling script again, so call it under ``if __name__ == "__main__":``. A
    notebook needs no such line.

    Args:
        recipe: What is trained and how: a `Recipe`, or the path of an experiment file, which defines ``model()``,
            ``train_set()`` and ``test_set()``. None trains a small network on digits.
        methods: Names of the methods; ``"base"`` must be one. None: the default ones; with ``Recipe(private=...)``
            those that may train so, with DP-SAT in both its forms.
        settings: For a method, for a hyperparameter, its value or several values, each of which makes a row, such as
            ``{"saf": {"coefficient": [0.3, 0.8]}}``.
        seeds: How many seeds; None: as many as fit in ``minutes``, at least 5.
        select: Compare only the best of each method's rows, chosen first by so many other seeds on a fifth of the
            training set that is held out. None: compare all rows.
        look: Also measure the sharpness of the first seed's networks, and the loss around them at so many points along
            each of two directions. 0: do not.
        after: Also measure what is left of each network after training: its accuracy with batch-norm statistics made
            anew, with weights rounded to 8, 4, 3 and 2 bits, with noise on them, and after a short fine-tune on inputs
            whose sign is changed, or by an experiment file's ``shift(x)``, on the original and on the shifted test set.
        minutes: Time for everything, where ``seeds`` is None.
        jobs: Runs at a time; None: one a core, or one on an accelerator.
        out: Folder of the comparison, new or empty; None for a new one under ``runs/``. The same call with the folder
            of a comparison that was ended goes on with it: it trains and measures what is missing.
        on_progress: Called from time to time with epochs done, epochs planned and a word on what is going on.

    Returns:
        The rows with accuracies, intervals, paired differences, p-values, costs and memory; the verdict; the folder.
        After Ctrl-C, what was done until then, with ``interrupted`` set.

    Raises:
        FlatminError: If an argument, a method, the data or the experiment file cannot be used, the folder cannot be
            written, a run fails, or the call is not guarded by ``if __name__ == "__main__":``.
        RunInterrupted: After Ctrl-C before an epoch was done; nothing is kept then.

    Example::

        from flatmin import lab

        if __name__ == "__main__":
            found = lab.compare(lab.Recipe(epochs=20), methods=["base", "sam", "saf"], seeds=5)
            print(found)
            print(found.rows[1].difference, found.folder)
    """
    if torchrun.launched() > 1:
        raise InvalidArgumentError("compare starts its own processes: run it without torchrun; jobs says how many")
    check_main_guard()
    recipe = as_recipe(recipe)
    if out is not None:
        check_path("out", out)
    check_numbers(seeds=seeds, select=select, look=look, minutes=minutes, jobs=jobs)
    if select is not None and recipe.validation > 0:
        raise InvalidArgumentError("select holds out samples itself: leave out validation or select")
    rows = asked_rows(recipe, methods, settings or {}, several=select is not None)
    tell = on_progress or (lambda done, planned, word: None)
    begun = None if out is None else find_begun(Path(out), recipe, rows, seeds=seeds, select=select)
    with _interruptible() as here, comparison_folder(out, begun) as folder:
        here.append(folder)
        for row in rows:
            warn_if_idle(row.label, row.settings, recipe.epochs)
        selection = None
        if begun is not None:
            rows, selection = begun.rows, begun.selection
        elif select is not None:
            chosen_in = folder / SELECTION
            rows, selection = select_rows(recipe, rows, chosen_in, seeds=select, jobs=jobs, on_progress=tell)
        comparison = Comparison(
            recipe,
            rows,
            folder,
            seeds=seeds,
            after=after,
            selection=selection,
            minutes=(1 - LOOKING) * minutes if look else minutes,
            jobs=jobs,
            on_progress=tell,
            going_on=begun is not None,
        )
        result = comparison.run().result(folder)
        if result.interrupted and not holds_work(folder):
            raise RunInterrupted("no epoch was done")
        _warn_of_diverged(result)
        if look and not result.interrupted:
            first = result.seeds[0]
            sound = [row for row in rows if not is_diverged(result.metrics[row.label][first])]
            look_at([comparison.run_folder(row, first) for row in sound], look, tell, trusted=begun is None)
        return dataclasses.replace(result, page=write_page(folder)) if result.seeds else result


@contextmanager
def _interruptible() -> Iterator[list[Path]]:
    """Says after Ctrl-C what was kept in the folder, which is given to the list once it is made."""
    here: list[Path] = []
    try:
        yield here
    except RunInterrupted:
        raise
    except KeyboardInterrupt:
        said = "no epoch was done"
        for folder in here:
            chosen_in = folder / SELECTION
            if (folder / RESULTS).exists():
                said = f"what was done is kept in {folder}"
            elif holds_work(chosen_in):
                said = f"the settings were not chosen yet, kept in {chosen_in}"
        raise RunInterrupted(said) from None


def _warn_of_diverged(result: ComparisonResult) -> None:
    """Warns once of all rows that have diverged."""
    lost = [f"{row.label} ({row.diverged} of {len(row.test_accuracy)})" for row in result.rows if row.diverged]
    if lost:
        warnings.warn(
            f"diverged with some or all seeds, so without a result: {', '.join(lost)}; lower the learning rate, or the "
            "method's rho or coefficient",
            FlatminWarning,
            stacklevel=3,
        )


def write_page(folder: Path) -> Path | None:
    """Writes a comparison's report; without Plotly there is none, and an error is only warned of."""
    if importlib.util.find_spec("plotly") is None:
        return None
    try:
        from ..report import write_report

        return write_report([folder])
    except KeyboardInterrupt:
        what = "interrupted while writing the report; the comparison itself is complete, kept in"
        warnings.warn(f"{what} {folder}", FlatminWarning, stacklevel=2)
    except Exception as error:  # the results are there, whatever befalls the page
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"the report could not be written: {reason}", FlatminWarning, stacklevel=2)
    return None
