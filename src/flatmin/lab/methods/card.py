"""A card a method: one frozen record that the command's options, its help and the tables of the docs are made from."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..._checks import Bounds
from ...errors import InvalidArgumentError
from .method import Assembled, Ingredients

Value = float | str | None
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter of a method.

    Args:
        default: Its value where none is given; None for a choice that the method makes itself.
        kind: ``int``, ``float`` or ``str``, which reads a value that was typed.
        help: A sentence on what it is, for the command's help.
        bounds: What a number may be; None for any.

    Raises:
        InvalidArgumentError: (a ValueError) if ``kind`` is none of the three, or ``default`` is not of it.

    Example:
        >>> Hyperparameter(0.3, float, "Weight of the loss.").read("0.5")
        0.5
    """

    default: Value
    kind: type
    help: str = ""
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        if self.kind not in (int, float, str):
            raise InvalidArgumentError(
                f"kind must be int, float or str, got {self.kind!r}; for a default of None say which: "
                "Hyperparameter(None, float)"
            )
        fits = (int, float) if self.kind is float else self.kind
        if self.default is not None and (isinstance(self.default, bool) or not isinstance(self.default, fits)):
            raise InvalidArgumentError(f"default must be of kind {self.kind.__name__}, got {self.default!r}")

    @classmethod
    def of(cls, value: "Hyperparameter | Value") -> "Hyperparameter":
        """Returns a hyperparameter as it is, and a plain value as the default of one of its type."""
        return value if isinstance(value, Hyperparameter) else cls(value, type(value))

    def read(self, text: str) -> Any:
        """Returns the value that ``text`` says.

        Raises:
            ValueError: If it is none of this kind.
        """
        return self.kind(text)


SMOOTHING = Hyperparameter(0.0, float, "Label smoothing of the criterion.", Bounds(least=0, below=1))


@dataclass(frozen=True, eq=False)
class Card:
    """A training method: what it is called, what there is to know of it, and how it is put together.

    Args:
        name: Its name in the command and in results: letters, digits, ``_`` and ``-``, a letter first.
        summary: What it adds to the plain optimizer, in a line.
        hyperparameters: By name, each a `Hyperparameter`, or its default alone. Every method has ``smoothing``, the
            label smoothing of the criterion; it is added, with 0, where it is left out.
        assemble: Called with the `Ingredients` and the settings, a value for each hyperparameter; returns the method
            `Assembled`.
        stands_for: The class or function of flatmin, or of your own, that it uses; None for none.
        use: How that is written in a loop, where the name alone does not say it.
        paper: Authors, year and arXiv number.
        choose: When to choose it, as the end of "choose it when": one clause.
        memory: What it keeps beyond the base optimizer, in words.
        passes: What it computes in a step beyond one forward and one backward pass, in words.
        closure_calls: How often a step with a second pass calls the closure; the other steps call it once.
        second_pass: Whether the step with index ``step``, of ``steps``, has a second pass, by ``(step, settings,
            steps)``; None where only the gradients tell. By default all have. A method of which only some steps have
            one needs a hyperparameter ``when`` as the SAM family has it, so that both kinds of steps can be timed.
        complete: Fills in settings that are tied to the run, by ``(settings, given, epochs)``: what they are so far,
            those that were given, and the length of the run. It returns all.
        private: Whether it may train with differential privacy, by its settings: the loss of a sample depends on that
            sample and the weights alone, and the optimizer is the plain one. By default it may not.

    Raises:
        InvalidArgumentError: (a ValueError) if the name, or that of a hyperparameter, cannot be used.

    Example:
        >>> def assemble(given, settings):
        ...     def penalty(logits, y, index, inputs):
        ...         return settings["strength"] * logits.square().mean()
        ...
        ...     return Assembled(given.optimizer, penalty=penalty)
        >>> card = Card("small_logits", "the mean square of the logits", {"strength": 0.1}, assemble)
        >>> dict(card.defaults)
        {'strength': 0.1, 'smoothing': 0.0}
    """

    name: str
    summary: str
    hyperparameters: Mapping[str, Any]
    assemble: Callable[[Ingredients, Settings], Assembled]
    stands_for: Callable[..., Any] | None = field(default=None, kw_only=True)
    use: str = field(default="", kw_only=True)
    paper: str = field(default="", kw_only=True)
    choose: str = field(default="", kw_only=True)
    memory: str = field(default="nothing", kw_only=True)
    passes: str = field(default="none", kw_only=True)
    closure_calls: int = field(default=1, kw_only=True)
    second_pass: Callable[[int, Settings, int], bool | None] = field(
        default=lambda step, settings, steps: True, kw_only=True, repr=False
    )
    complete: Callable[[dict[str, Any], Settings, int], dict[str, Any]] = field(
        default=lambda settings, given, epochs: settings, kw_only=True, repr=False
    )
    private: Callable[[Settings], bool] = field(default=lambda settings: False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        plain = self.name.replace("_", "").replace("-", "")
        if not (plain.isascii() and plain.isalnum() and self.name[0].isalpha()):
            raise InvalidArgumentError(f"name must be letters, digits, _ and -, a letter first, got {self.name!r}")
        for name in self.hyperparameters:
            if not name.isidentifier():
                raise InvalidArgumentError(f"a hyperparameter of {self.name} must have a name of Python, got {name!r}")
        known = {name: Hyperparameter.of(value) for name, value in self.hyperparameters.items()}
        known.setdefault("smoothing", SMOOTHING)
        object.__setattr__(self, "hyperparameters", MappingProxyType(known))

    @property
    def defaults(self) -> dict[str, Value]:
        """The default of each hyperparameter."""
        return {name: known.default for name, known in self.hyperparameters.items()}

    def calls(self, step: int, settings: Settings, steps: int) -> int | None:
        """How often step number ``step`` of ``steps`` calls the closure; None where only the gradients tell."""
        second_pass = self.second_pass(step, settings, steps)
        return None if second_pass is None else self.closure_calls if second_pass else 1


def signature_defaults(source: Callable[..., Any], *names: str) -> dict[str, Any]:
    """The defaults that a class or function has for some of its arguments."""
    parameters = inspect.signature(source).parameters
    return {name: parameters[name].default for name in names}
