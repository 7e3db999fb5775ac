"""How rows are told apart: by colour (Okabe and Ito's, which the colour-blind can tell apart), dash and marker."""

from dataclasses import dataclass

INK = "ink"  # the colour of text, light or dark as the page is
# On white; page.css has them for a dark page too. Yellow is left out, being too light on white.
COLOURS = {
    INK: "#1d2125",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
}
# As Plotly and as matplotlib have them.
_DASHES = (
    ("dash", (0, (6, 3))),
    ("solid", "-"),
    ("dashdot", "-."),
    ("dot", ":"),
    ("longdash", (0, (10, 3))),
    ("longdashdot", (0, (10, 3, 2, 3))),
)
_MARKERS = (
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("cross", "P"),
    ("x", "X"),
    ("star", "*"),
    ("triangle-down", "v"),
    ("pentagon", "p"),
    ("hexagon", "h"),
)


@dataclass(frozen=True)
class Style:
    """The name of a colour, and dash and marker in Plotly's words and in matplotlib's."""

    colour: str
    dash: str
    marker: str
    line_style: str | tuple[int, tuple[int, ...]]
    marker_style: str


def style(place: int) -> Style:
    """The style of a row by its place: the first plain in the colour of text, and no two alike among the first 37.

    Example:
        >>> from flatmin.lab.report._style import style
        >>> len({(s.colour, s.dash, s.marker) for s in map(style, range(37))})
        37
    """
    if not place:
        return Style(INK, "solid", "circle", "-", "o")
    colours = [name for name in COLOURS if name != INK]
    turn, colour = divmod(place - 1, len(colours))
    dash, marker = _DASHES[(colour + turn) % len(_DASHES)], _MARKERS[(place - 1) % len(_MARKERS)]
    return Style(colours[colour], dash[0], marker[0], dash[1], marker[1])
