"""The command's options: one for each field of the recipe and each hyperparameter, and which of them were given."""

import dataclasses
import inspect
import shlex
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..._checks import Bounds
from ...errors import ExperimentError, FlatminError, InvalidArgumentError
from ..methods import METHODS
from ..methods import parse_settings as parse_settings
from ..methods.hyperparameters import HYPERPARAMETERS, option_help
from ..problems.load import import_experiment
from ..recipe import Recipe, Run
from ._terminal import err_console

Debug = Annotated[bool, typer.Option("--debug", help="Where an experiment file is wrong, show its traceback too.")]


def bounded(bounds: Bounds, *names: str, help: str, **more: Any) -> Any:
    """An option of a number, which is refused out of its bounds before the command begins, and whose help has them."""
    text, _, default = help.partition("  [default")

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        try:
            return None if value is None else bounds.check(str(parameter.name), value)
        except InvalidArgumentError as error:
            raise typer.BadParameter(str(error)) from error

    text = f"{text} ({bounds})" + (f"  [default{default}" if default else "")
    return typer.Option(*names, help=text, callback=check, **more)


@contextmanager
def running_user_code(debug: bool) -> Iterator[None]:
    """Lets nothing that a user's file does end the command but as an error; ``debug`` shows where it came from."""
    try:
        try:
            yield
        except SystemExit as error:  # from a place that is not seen to be the file's
            raise ExperimentError(f"sys.exit({error.code!r}) was called while the command was running") from error
    except FlatminError as error:
        if debug and error.__cause__ is not None:
            err_console.print("".join(traceback.format_exception(error.__cause__)).rstrip(), markup=False)
        raise


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of the recipe, which it receives as one ``recipe``.

    A parameter ``settings`` becomes an option for each hyperparameter of flatmin's own methods; those of methods that
    an experiment file registers are given by ``--set``. The file is run before the command is called, so that they are
    known; where a run is resumed, that run names its own.
    """
    own = inspect.signature(command).parameters
    hints = get_type_hints(Recipe)
    recipe, settings = [], []
    for field in dataclasses.fields(Recipe):
        text = field.metadata["help"]
        option = typer.Argument(help=text) if field.name == "experiment" else typer.Option(help=text)
        recipe.append(_parameter(field.name, Annotated[hints[field.name], option], field.default))
    if "settings" in own:
        for name, (kind, *_) in HYPERPARAMETERS.items():
            option = typer.Option(help=option_help(name, METHODS.values()))
            settings.append(_parameter(name, Annotated[kind | None, option], None))

    def wrapper(**values: Any) -> None:
        arguments = {name: values[name] for name in own if name in values}
        if "settings" in own:
            given = {parameter.name: values[parameter.name] for parameter in settings}
            arguments["settings"] = {name: value for name, value in given.items() if value is not None}
        made = Recipe(**{parameter.name: values[parameter.name] for parameter in recipe})
        with running_user_code(values["debug"]):
            if values.get("resume") is None:
                import_experiment(made)
            command(recipe=made, **arguments)

    rest = [parameter for name, parameter in own.items() if name not in ("recipe", "settings")]
    debug = _parameter("debug", Debug, False)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*rest, *settings, *recipe, debug)]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions have it, by their description
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def given_options(context: typer.Context) -> dict[str, Any]:
    """The options and arguments that were typed, by name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def check_resumed(run: Run, folder: Path, given: dict[str, Any]) -> None:
    """Checks that options given beside ``--resume`` are the run's own.

    Raises:
        InvalidArgumentError: If one differs; it names each and what the run has.
    """
    has = {"method": run.method, "seed": run.seed, **dataclasses.asdict(run.recipe), **run.settings}
    differ = []
    for name, value in given.items():
        if name in ("out", "experiment"):
            own = str(folder) if name == "out" else run.recipe.experiment
            same = own is not None and Path(value).resolve() == Path(own).resolve()
        else:
            own = has.get(name)
            same = value == own
        if not same:
            flag = "the experiment file" if name == "experiment" else f"--{name.replace('_', '-')}"
            has_what = "was begun without" if own is None else f"has {own}"
            differ.append(f"{flag} {shlex.quote(str(value))} (the run {has_what})")
    if differ:
        raise InvalidArgumentError(
            f"{folder} continues with its own options, from which these differ: {', '.join(differ)}; leave them out, "
            "or start a new run; only --device, --workers and --checkpoint-minutes may change with --resume"
        )
