"""What all of Plotly's figures share: colours, markers, axes.

Colours that depend on the page being light or dark are words after ``@``, under keys that end in ``color``: the page
puts theirs in. Labels are the user's: Plotly reads a few HTML tags in them, so these are escaped.
"""

import html
from collections.abc import Sequence
from typing import Any

from ._charts import Chart, Dot
from ._style import style

Figure = dict[str, Any]
_SIZES = {
    "triangle-up": 1.25,
    "triangle-down": 1.25,
    "star": 1.4,
    "x": 1.1,
}  # of markers that look small


def of(place: int, label: str) -> Figure:
    """What tells Plotly, and the page's buttons, to which row a trace belongs."""
    return {"type": "scatter", "name": html.escape(label), "meta": {"row": place}}


def colour_of(place: int, opacity: float = 1.0) -> str:
    """A row's colour as a word for the page."""
    colour = f"@{style(place).colour}"
    return colour if opacity == 1.0 else f"{colour}/{opacity:g}"


def marker(place: int, size: int, **more: Any) -> Figure:
    """A row's marker."""
    return {
        "color": colour_of(place),
        "symbol": style(place).marker,
        "size": size * _SIZES.get(style(place).marker, 1),
        "line": {"color": "@paper", "width": 1},
        **more,
    }


def error(dot: Dot) -> Figure:
    """A dot's interval, if it has one."""
    bar = {"color": colour_of(dot.place), "thickness": 1.75, "width": 5}
    return {"type": "data", "array": short([dot.half]), "visible": dot.half is not None, **bar}


def plain(height: int) -> Figure:
    """A layout without axes."""
    return {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": "@ink"},
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "showlegend": False,
    }


def layout(chart: Chart, height: int) -> Figure:
    """A layout with a chart's two axes."""
    axis = {"gridcolor": "@grid", "linecolor": "@muted", "zeroline": False, "automargin": True, "fixedrange": True}
    quiet = {"tickcolor": "@grid", "tickfont": {"color": "@muted"}}

    def title(text: str) -> Figure:
        font = {"size": 13, "color": "@muted"}
        return {"text": html.escape(text), "font": font, "standoff": 8}

    return {
        **plain(height),
        "dragmode": False,
        "margin": {"l": 8, "r": 12, "t": 14, "b": 8},
        "xaxis": {**axis, **quiet, "title": title(chart.x), "showgrid": False, "showline": True},
        "yaxis": {**axis, **quiet, "title": title(chart.y)},
    }


def short(values: Sequence[float | None]) -> list[float | None]:
    """Numbers to six significant digits: what is drawn does not need more, and the file is shorter."""
    return [None if value is None else float(f"{value:.6g}") for value in values]
