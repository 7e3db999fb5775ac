"""The command's options: one for each field of the recipe and each hyperparameter, and which of them were given."""

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ...errors import InvalidArgumentError
from ..methods.registry import HYPERPARAMETERS, get_method, resolve_settings
from ..recipe import Recipe, Run


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of the recipe, which it receives as one ``recipe``.

    A parameter ``settings`` likewise becomes an option for each hyperparameter of the methods.
    """
    own = inspect.signature(command).parameters
    hints = get_type_hints(Recipe)
    recipe, settings = [], []
    for field in dataclasses.fields(Recipe):
        text = field.metadata["help"]
        option = typer.Argument(help=text) if field.name == "experiment" else typer.Option(help=text)
        recipe.append(_parameter(field.name, Annotated[hints[field.name], option], field.default))
    if "settings" in own:
        for name, (kind, text) in HYPERPARAMETERS.items():
            settings.append(_parameter(name, Annotated[kind | None, typer.Option(help=text)], None))

    def wrapper(**values: Any) -> None:
        arguments = {name: values[name] for name in own if name in values}
        if "settings" in own:
            given = {parameter.name: values[parameter.name] for parameter in settings}
            arguments["settings"] = {name: value for name, value in given.items() if value is not None}
        command(recipe=Recipe(**{parameter.name: values[parameter.name] for parameter in recipe}), **arguments)

    rest = [parameter for name, parameter in own.items() if name not in ("recipe", "settings")]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*rest, *settings, *recipe)]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
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
            "or start a new run; only --device, --workers and --checkpoint-minutes may be others beside --resume"
        )


def parse_settings(texts: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Reads the values of ``--set``: for a method, for a hyperparameter, the values to try.

    Raises:
        InvalidArgumentError: If one cannot be read, or names what there is not.
    """
    settings: dict[str, dict[str, list[Any]]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        method, dot, hyperparameter = name.partition(".")
        if not (equals and dot and values):
            raise InvalidArgumentError(f"--set {text!r} must look like saf.coefficient=0.8 or saf.coefficient=0.3,0.8")
        if hyperparameter not in get_method(method).defaults:
            resolve_settings(get_method(method), {hyperparameter: 0}, epochs=1)  # says what there is
        kind = HYPERPARAMETERS[hyperparameter][0]
        for value in values.split(","):
            try:
                settings.setdefault(method, {}).setdefault(hyperparameter, []).append(kind(value))
            except ValueError:
                wanted = "an integer" if kind is int else "a number"
                raise InvalidArgumentError(
                    f"--set {text!r}: {hyperparameter} must be {wanted}, got {value!r}"
                ) from None
    return settings
