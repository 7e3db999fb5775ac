"""The command: ``flatmin train`` and ``flatmin compare``."""

import dataclasses
import os
import shlex
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from ._options import check_resumed, given_options, parse_settings, with_options
from ._terminal import Display, err_console, out_console, print_outcome, speaking
from .engine import ranks
from .engine.compare import Comparison
from .engine.config import Recipe, Run
from .engine.load import has_criterion
from .engine.methods import COMPARED, METHODS, get_method, resolve_settings
from .engine.outcome import make_rows
from .engine.record import LAST, METRICS, run_folder
from .engine.resume import find_run, read_run
from .engine.train import resume as resume_run
from .engine.train import train as train_run
from .errors import FlatminError, FlatminWarning, InvalidArgumentError

app = typer.Typer(
    help="Train networks into flat minima at the price of the plain optimizer, and measure what it gains.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_COMPARED = ",".join(COMPARED)
_METHOD_HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Train networks into flat minima at the price of the plain optimizer, and measure what it gains."""
    if version:
        out_console.print(f"flatmin {__version__}")
    elif context.invoked_subcommand is None:
        out_console.print(context.get_help(), markup=False)


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
    with ranks.joined(recipe.device):
        # The folder is the first rank's, who alone makes it and writes into it.
        own = run_folder(out, f"{method}-seed{seed}") if ranks.rank() == 0 else nullcontext(Path())
        with own as made:
            folder = Path(ranks.from_first(str(made)))  # of which the others only speak
            _warn_if_idle(method, run.settings, recipe.epochs)
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

    with ranks.joined(run.recipe.device):
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
            raise _Interrupted("no epoch was done") from None
        metrics = folder / METRICS
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        raise _Interrupted(
            f"{done} of {run.recipe.epochs} epochs are kept in {folder}; "
            f"to go on: flatmin train --resume {shlex.quote(str(folder))}"
        ) from None


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
    minutes: Annotated[float, typer.Option(help="Time for all, where --seeds is not given.", min=0.1)] = 3.0,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time.  [default: one a core; one on an accelerator]", min=1)
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the comparison.  [default: a new one under runs/]")] = None,
) -> None:
    """Compare methods on the same splits, initial weights and batches, seed by seed.

    Prints the test accuracy after the last epoch, its paired difference to the base optimizer, both with a 95 %
    confidence interval, and what each method costs. EXPERIMENT, a Python file that defines model(), train_set() and
    test_set(), takes the place of --data and --model: does it help on my problem, and what does it cost?
    """
    if ranks.launched() > 1:
        raise InvalidArgumentError("compare starts processes of its own: run it without torchrun, with --jobs")
    names = _default_methods(recipe) if methods is None else [name.strip() for name in methods.split(",")]
    rows = make_rows(names, parse_settings(set_ or []), epochs=recipe.epochs)
    with run_folder(out, "compare") as folder:
        for row in rows:
            _warn_if_idle(row.label, row.settings, recipe.epochs)
        with Display() as display:
            outcome = Comparison(
                recipe, rows, folder, seeds=seeds, minutes=minutes, jobs=jobs, on_progress=display.tell
            ).run()
        print_outcome(outcome, folder / "results.json")
        if outcome.interrupted:
            kept = f"kept in {folder}" if any(folder.rglob("metrics.jsonl")) else "no epoch was done"
            raise _Interrupted(f"{len(outcome.seeds)} seeds are finished, {kept}")


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 after one line on what was wrong.

    Args:
        arguments: What follows ``flatmin`` on the command line; None for this process's own.
    """
    command = typer.main.get_command(app)
    # A plain kill ends a run as Ctrl-C does: what was done is kept and said.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with speaking(quiet=ranks.rank() > 0):  # one says for all what is going on
        try:
            code = command.main(args=arguments, prog_name="flatmin", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except (FlatminError, _Interrupted) as error:
            message = str(error)
            if "flatmin.errors." in message:  # from a loader's worker: its traceback, and then what was said
                message = message.rpartition("flatmin.errors.")[2].partition(": ")[2]
        except KeyboardInterrupt:
            message = "interrupted before anything was done"
        except Exception as error:
            # typer's own usage errors, whatever version of click they come from
            format_message = getattr(error, "format_message", None)
            if format_message is None and ranks.claim_failure():
                raise
            message = "" if format_message is None else format_message()
    # Of several ranks the first to fail says why; what the others meet then is only that it has gone.
    if not ranks.claim_failure():
        os._exit(2)  # at once: torch would wait for the one that is gone
    err_console.print(f"flatmin: {' '.join(message.split())}", markup=False)
    return 2


class _Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, with what was kept."""

    def __str__(self) -> str:
        return f"interrupted: {super().__str__()}"


def _default_methods(recipe: Recipe) -> list[str]:
    """Those compared by default; without label smoothing where it cannot be, on a criterion of the user's own."""
    if not has_criterion(recipe):
        return list(COMPARED)
    err_console.print(f"{recipe.experiment} has its own criterion(), so smoothing is left out", markup=False)
    return [name for name in COMPARED if name != "smoothing"]


def _warn_if_idle(label: str, settings: Any, epochs: int) -> None:
    first = max(settings.get("start_epoch", 0), settings.get("lag", 0))
    if first >= epochs:
        warnings.warn(
            f"{label}: the trajectory loss would begin in epoch {first}, from 0, and there are {epochs} epochs, "
            "so it never acts: train longer, or lower start_epoch and lag",
            FlatminWarning,
            stacklevel=2,
        )
