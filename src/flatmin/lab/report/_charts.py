"""Charts as plain data: what is drawn and the same numbers as a table; drawn by `_plotly` and by `_static`.

Every chart knows its numbers in words, so that who sees no colours, or nothing at all, misses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

Values = Sequence[float | None]


@dataclass(frozen=True)
class Table:
    """Headings, and rows of cells of which the first names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """What all charts have.

    Attributes:
        key: Names it in files and addresses.
        title: A few words.
        text: What is to be seen, in a sentence or two.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        table: Its numbers.
    """

    key: str
    title: str
    text: str
    x: str
    y: str
    table: Table


@dataclass(frozen=True)
class Line:
    """One curve: ``place`` is its row's in the study, by which it is styled; the band is between low and high."""

    label: str
    place: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Curves(Chart):
    """Curves, on a logarithmic scale or not, with a level to compare them with or none."""

    lines: Sequence[Line] = ()
    log: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Dot:
    """A row's mean with its interval and the single values behind it."""

    label: str
    place: int
    mean: float
    half: float | None = None
    cost: float = 0.0
    on_front: bool = False
    values: Sequence[float] = ()


@dataclass(frozen=True)
class Cost(Chart):
    """Dots of accuracy over cost, the Pareto front among them."""

    dots: Sequence[Dot] = ()

    @property
    def front(self) -> list[Dot]:
        """The dots that none betters in both, from the cheapest on."""
        return sorted((dot for dot in self.dots if dot.on_front), key=lambda dot: (dot.cost, dot.mean))


@dataclass(frozen=True)
class Strip(Chart):
    """A line for each row with dots along it: differences with intervals, memory, eigenvalues."""

    dots: Sequence[Dot] = ()
    zero: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Grid:
    """The loss over a plane: ``loss[i][j]`` at ``x[j]``, ``y[i]``, None where it is not finite."""

    label: str
    place: int
    x: Sequence[float]
    y: Sequence[float]
    loss: Sequence[Values]
    points: Sequence[tuple[str, float, float]] = ()


@dataclass(frozen=True)
class Landscapes(Chart):
    """Loss over a plane for several rows, all on one scale from ``low`` to ``high``."""

    grids: Sequence[Grid] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = field(default=False)
