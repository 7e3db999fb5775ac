"""``flatmin train``."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import _distributed
from ..methods.registry import METHODS, get_method, resolve_settings
from ..recipe import Recipe, Run
from ..runs.record import LAST, METRICS, run_folder
from ..runs.resume import find_run, read_run
from ..runs.run import resume as resume_run
from ..runs.run import train as train_run
from ..training import torchrun
from ._options import check_resumed, given_options, with_options
from ._shared import Interrupted, app, warn_if_idle
from ._terminal import out_console

_METHOD_HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())


@app.command()
@with_options
def train(
    context: typer.Context,
    recipe: Recipe,
    settings: dict[str, Any],
    method: Annotated[str, typer.Option(help=_METHOD_HELP)] = "saf",
    seed: Annotated[int, typer.Option(help="Draws split, initial weights, order and augmentation.", min=0)] = 0,
    out: Annotated[str | None, typer.Option(help="Folder of the run.  [default: a new one under runs/]")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Continue the run in this folder, or from one of its checkpoints, with its own options."),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="How long an epoch goes on without a checkpoint; 0 for one after every step.", min=0)
    ] = 10.0,
) -> None:
    """Train one network with one method and keep the run in a folder.

    The folder receives config.json, metrics.jsonl (a line an epoch) and checkpoints/last, /previous and /best.
    EXPERIMENT, a Python file that defines model(), train_set() and test_set(), takes the place of --data and --model.
    After a crash, --resume FOLDER continues where it was. On several GPUs, or processes: torchrun --nproc-per-node 2 -m
    flatmin train ...; the batch size is that of all together.
    """
    if resume is not None:
        _resume(Path(resume), given_options(context), checkpoint_minutes)
        return
    run = Run(recipe, method, resolve_settings(get_method(method), settings, epochs=recipe.epochs), seed)
    with torchrun.joined(recipe.device):
        # The folder is the first rank's, who alone makes it and writes into it.
        own = run_folder(out, f"{method}-seed{seed}") if torchrun.rank() == 0 else nullcontext(Path())
        with own as made:
            folder = Path(_distributed.from_first(str(made)))  # of which the others only speak
            warn_if_idle(method, run.settings, recipe.epochs)
            with _interruptible(run, folder):
                last = train_run(run, folder, on_epoch=_show(recipe.epochs), checkpoint_minutes=checkpoint_minutes)
        _conclude(last, folder)


def _resume(path: Path, given: dict[str, Any], checkpoint_minutes: float) -> None:
    """Continues a run with its own options but for where it is done."""
    folder, checkpoint = find_run(path)
    run = read_run(folder)
    place = {name: given.pop(name) for name in ("device", "workers") if name in given}
    given = {name: value for name, value in given.items() if name not in ("resume", "checkpoint_minutes")}
    check_resumed(run, folder, given)
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **place))
    shown: list[dict[str, float]] = []
    show = _show(run.recipe.epochs)

    def note(metrics: dict[str, float]) -> None:
        shown.append(metrics)
        show(metrics)

    with torchrun.joined(run.recipe.device):
        with _interruptible(run, folder):
            last = resume_run(run, folder, checkpoint, on_epoch=note, checkpoint_minutes=checkpoint_minutes)
        if not shown:
            out_console.print(f"the run is finished: all {run.recipe.epochs} epochs were done before", markup=False)
        _conclude(last, folder)


def _show(epochs: int) -> Callable[[dict[str, float]], None]:
    def show(metrics: dict[str, float]) -> None:
        out_console.print(
            f"epoch {int(metrics['epoch']) + 1:>{len(str(epochs))}}/{epochs}"
            f"  loss {metrics['train_loss']:.4f} (without penalty {metrics['train_loss_vanilla']:.4f})"
            f"  test {metrics['test_loss']:.4f}, {100 * metrics['test_accuracy']:.2f} %"
            f"  {metrics['seconds']:.1f} s"
        )

    return show


def _conclude(last: dict[str, float], folder: Path) -> None:
    accuracy = f"{100 * last['test_accuracy']:.2f} %"
    out_console.print(f"test accuracy after the last epoch {accuracy}; the run is in {folder}", markup=False)


@contextmanager
def _interruptible(run: Run, folder: Path) -> Iterator[None]:
    """Says after Ctrl-C what was kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / LAST).exists():
            raise Interrupted("no epoch was done") from None
        metrics = folder / METRICS
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        raise Interrupted(
            f"{done} of {run.recipe.epochs} epochs are kept in {folder}; "
            f"to go on: flatmin train --resume {shlex.quote(str(folder))}"
        ) from None
