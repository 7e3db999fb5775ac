"""Errors and warnings that flatmin raises on purpose.

Each names the argument, the value it got and the way out::

    Exception
    └── FlatminError                          everything below; the command prints it as one line
        ├── InvalidArgumentError (ValueError)     a wrong argument, shape, index or hyperparameter
        │   ├── NoDirectionError                      normalised logits that have no direction to measure
        │   └── StateDictError (RuntimeError)         a state_dict that is none, or of something else
        ├── DataError                             a data file or folder that is missing, empty or damaged
        ├── ExperimentError                       an experiment file that cannot be used
        ├── NonFiniteLossError (ArithmeticError)  a loss that is infinite or not a number, where one is to be measured
        │   └── DivergedError                         a training without a finite loss from its first step on
        ├── OutputError (OSError)                 a folder that cannot be written
        └── MissingDependencyError (ImportError)  an optional package that is not installed

    UserWarning
    └── FlatminWarning                        a likely mistake, warned once
        └── NonFiniteGradientWarning              a step that was dropped
"""

import importlib
from collections.abc import Mapping
from types import ModuleType


class FlatminError(Exception):
    """Base of all errors raised by flatmin on purpose."""


class InvalidArgumentError(FlatminError, ValueError):
    """An argument has a value or a shape that cannot be used."""


class NoDirectionError(InvalidArgumentError):
    """Logits cannot be normalised: they are of fewer than three classes, or a sample's are all equal."""


class StateDictError(InvalidArgumentError, RuntimeError):
    """A ``state_dict`` cannot be loaded; a RuntimeError too, as torch's own for that."""


class DataError(FlatminError):
    """A data file or folder is missing, empty or damaged."""


class ExperimentError(FlatminError):
    """An experiment file cannot be used."""


class NonFiniteLossError(FlatminError, ArithmeticError):
    """A loss, or a derivative of it, is infinite or not a number, and so cannot be measured."""


class DivergedError(NonFiniteLossError):
    """A training has had no finite loss from its first step on.

    Attributes:
        metrics: What is known of its first epoch, by name, for a comparison that goes on without it.
    """

    def __init__(self, message: str, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.metrics = dict(metrics or {})


class OutputError(FlatminError, OSError):
    """A folder or file cannot be written."""


class MissingDependencyError(FlatminError, ImportError):
    """An optional package is not installed."""


class FlatminWarning(UserWarning):
    """A likely mistake, warned once."""


class NonFiniteGradientWarning(FlatminWarning):
    """A step was dropped because a gradient was infinite or not a number."""


def require(module: str, *, install: str, oldest: tuple[int, int] | None = None) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: What to import, such as ``"sklearn.datasets"``.
        install: What to give to ``pip install``, such as ``"flatmin[cli]"``.
        oldest: The first two numbers of the oldest version that will do. None: any.

    Raises:
        MissingDependencyError: If it cannot be imported, or is too old; the message says what to install.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module.split('.')[0]!r} is needed here and could not be imported ({error}); pip install '{install}'"
        ) from error
    if oldest is not None:
        version = str(found.__version__)
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < oldest:
            raise MissingDependencyError(
                f"{module} {version} is too old, {'.'.join(map(str, oldest))} is needed; pip install '{install}'"
            )
    return found
