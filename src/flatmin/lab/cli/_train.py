"""``flatmin train``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import InvalidArgumentError
from ..methods import METHODS, get_method, parse_own_settings
from ..recipe import SEED, Recipe
from ..results.files import check_path
from ..runs.resume import find_run, read_run
from ..runs.train import CHECKPOINT_MINUTES
from ..runs.train import resume as resume_one
from ..runs.train import train as train_one
from ._options import bounded, check_resumed, given_options, with_options
from ._shared import TrustExperiment, app, interruptible
from ._terminal import out_console

_METHOD_HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
_METHOD_HELP = f"{_METHOD_HELP}; or one that EXPERIMENT registers.".replace("`", "")


@app.command()
@with_options
def train(
    context: typer.Context,
    recipe: Recipe,
    settings: dict[str, Any],
    method: Annotated[str, typer.Option(help=_METHOD_HELP)] = "saf",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A hyperparameter of the method, the only way for those of a method that EXPERIMENT registers. May be "
            "repeated.",
        ),
    ] = None,
    seed: Annotated[int, bounded(SEED, help="Draws split, initial weights, order and augmentation.")] = 0,
    out: Annotated[str | None, typer.Option(help="Folder of the run.  [default: a new one under runs/]")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Continue the run in this folder, or from one of its checkpoints, with its own options."),
    ] = None,
    checkpoint_minutes: Annotated[
        float,
        bounded(CHECKPOINT_MINUTES, help="How long an epoch goes on without a checkpoint; 0 for one after every step."),
    ] = 10.0,
    trust_experiment: TrustExperiment = False,
) -> None:
    """Train one network with one method and keep the run in a folder.

    The folder receives config.json, metrics.jsonl (a line an epoch) and checkpoints/last, /previous and /best.
    EXPERIMENT, a Python file that defines model(), train_set() and test_set(), takes the place of --data and --model.
    After a crash, --resume FOLDER continues where it was. On several GPUs, or processes: torchrun --nproc-per-node 2 -m
    flatmin train ...; the batch size is that of all together.
    """
    if resume is not None:
        _resume(check_path("resume", resume), given_options(context), checkpoint_minutes, trust_experiment)
        return
    if trust_experiment:
        raise InvalidArgumentError("--trust-experiment is for --resume; EXPERIMENT is run without it")
    own = parse_own_settings(get_method(method), set_ or [])
    for name in own.keys() & settings.keys():
        raise InvalidArgumentError(f"{name} is given twice, by --set and by --{name.replace('_', '-')}: give it once")
    with interruptible(lambda: "no epoch was done"):
        done = train_one(
            recipe,
            method=method,
            settings={**settings, **own},
            seed=seed,
            out=out,
            checkpoint_minutes=checkpoint_minutes,
            on_epoch=_show(recipe.epochs),
        )
    out_console.print(str(done), markup=False)


def _resume(path: Path, given: dict[str, Any], checkpoint_minutes: float, trust_experiment: bool) -> None:
    """Continues a run with its own options but for where it is done."""
    folder, _ = find_run(path)
    run = read_run(folder, trust_experiment=trust_experiment)
    place = {name: given.pop(name) for name in ("device", "workers") if name in given}
    own = parse_own_settings(get_method(run.method), given.pop("set_", None) or [])
    beside = ("resume", "checkpoint_minutes", "trust_experiment", "debug")
    given = {name: value for name, value in given.items() if name not in beside}
    check_resumed(run, folder, {**given, **own})
    shown: list[dict[str, float]] = []
    show = _show(run.recipe.epochs)

    def note(metrics: dict[str, float]) -> None:
        shown.append(metrics)
        show(metrics)

    with interruptible(lambda: "no epoch was done"):
        done = resume_one(
            path, checkpoint_minutes=checkpoint_minutes, trust_experiment=trust_experiment, on_epoch=note, **place
        )
    if not shown:
        out_console.print(f"the run is finished: all {run.recipe.epochs} epochs were done before", markup=False)
    out_console.print(str(done), markup=False)


def _show(epochs: int) -> Callable[[dict[str, float]], None]:
    def show(metrics: dict[str, float]) -> None:
        out_console.print(
            f"epoch {int(metrics['epoch']) + 1:>{len(str(epochs))}}/{epochs}"
            f"  loss {metrics['train_loss']:.4f} (without penalty {metrics['train_loss_vanilla']:.4f})"
            f"  test {metrics['test_loss']:.4f}, {100 * metrics['test_accuracy']:.2f} %"
            f"  {metrics['seconds']:.1f} s"
        )

    return show
