"""Charts as Plotly's figures, in plain dictionaries.

Colours that depend on the page being light or dark are words after ``@``, under keys that end in ``color``: the page
puts theirs in. Labels are the user's: Plotly reads a few HTML tags in them, so these are escaped.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from ._charts import Chart, Cost, Curves, Dot, Grid, Landscapes, Strip
from ._style import style

Figure = dict[str, Any]
_MOST_NAMED = 8  # dots that carry their names beside them
_FEW_DECADES = 2
_SIZES = {
    "triangle-up": 1.25,
    "triangle-down": 1.25,
    "star": 1.4,
    "x": 1.1,
}  # of markers that look small


def figures(chart: Chart) -> list[Figure]:
    """A chart's figures: one, or for landscapes a surface and a map for each row."""
    if isinstance(chart, Landscapes):
        return [draw(grid, chart) for grid in chart.grids for draw in (_surface, _map)]
    draw: dict[type[Chart], Callable[[Any], Figure]] = {Curves: _curves, Cost: _cost, Strip: _strip}
    return [draw[type(chart)](chart)]


def _curves(chart: Curves) -> Figure:
    data = []
    for line in chart.lines:
        if line.low:
            data.append(
                {
                    **_of(line.place, line.label),
                    "mode": "lines",
                    "x": _short([*line.x, *reversed(line.x)]),
                    "y": _short([*line.high, *reversed(line.low)]),
                    "fill": "toself",
                    "fillcolor": _colour(line.place, 0.16),
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                }
            )
    for line in chart.lines:
        look = style(line.place)
        data.append(
            {
                **_of(line.place, line.label),
                "mode": "lines+markers" if len(line.x) > 1 else "markers",
                "x": _short(line.x),
                "y": _short(line.y),
                "line": {"color": _colour(line.place), "width": 2, "dash": look.dash},
                "marker": _marker(line.place, 7, maxdisplayed=9),
                "hovertemplate": "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
            }
        )
    layout = _layout(chart, 340)
    layout["hovermode"] = "closest"
    if chart.log:
        layout["yaxis"].update(type="log", **_ticks(chart))
    if chart.level is not None:
        line_style = {"color": "@muted", "width": 1, "dash": "dot"}
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": chart.level,
                "y1": chart.level,
                "line": line_style,
            }
        ]
    return {"data": data, "layout": layout}


def _ticks(chart: Curves) -> Figure:
    """Ticks of a logarithmic axis as plain numbers: 1, 2 and 5 in each decade, or some powers of ten."""
    values = [value for line in chart.lines for value in (*line.y, *line.low, *line.high)]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    wide = last - first
    factors = (1, 2, 5) if wide <= _FEW_DECADES else (1,)
    step = 1 + wide // (3 * _FEW_DECADES)
    ticks = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return {"tickvals": ticks, "ticktext": [f"{tick:.6g}" for tick in ticks]}


def _cost(chart: Cost) -> Figure:
    front = chart.front
    data: list[Figure] = [
        {
            "type": "scatter",
            "name": "cheapest for its accuracy",
            "mode": "lines",
            "x": _short([dot.cost for dot in front]),
            "y": _short([dot.mean for dot in front]),
            "line": {"color": "@muted", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    places = _text_places(chart.dots)
    for dot, place in zip(chart.dots, places, strict=True):
        data.append(
            {
                **_of(dot.place, dot.label),
                "mode": "markers+text" if len(chart.dots) <= _MOST_NAMED else "markers",
                "x": _short([dot.cost]),
                "y": _short([dot.mean]),
                "text": [html.escape(dot.label)],
                "textposition": place,
                "textfont": {"color": "@ink"},
                "marker": _marker(dot.place, 12 if dot.on_front else 10),
                "error_y": _error(dot),
                "cliponaxis": False,
                "hovertemplate": "%{fullData.name}<br>%{x:.2f} x, %{y:.2f} %<extra></extra>",
            }
        )
    layout = _layout(chart, 470)
    low, high = min(dot.cost for dot in chart.dots), max(dot.cost for dot in chart.dots)
    pad = (high - low) or 1.0
    layout["xaxis"].update(ticksuffix=" x", range=[low - 0.08 * pad, high + 0.2 * pad])
    return {"data": data, "layout": layout}


def _text_places(dots: Sequence[Dot]) -> list[str]:
    """Names to the right of their dots, above or below where another would be in the way."""
    wide = max(dot.cost for dot in dots) - min(dot.cost for dot in dots) or 1.0
    tall = max(dot.mean for dot in dots) - min(dot.mean for dot in dots) or 1.0
    places = []
    for dot in dots:
        near = [
            other for other in dots
            if other is not dot and abs(other.mean - dot.mean) < 0.1 * tall and 0 <= other.cost - dot.cost < 0.25 * wide
        ]  # fmt: skip
        below = any(other.mean > dot.mean for other in near)
        places.append("middle right" if not near else "bottom right" if below else "top right")
    return places


def _strip(chart: Strip) -> Figure:
    data: list[Figure] = []
    labels = [html.escape(dot.label) for dot in chart.dots]
    for dot, label in zip(chart.dots, labels, strict=True):
        if chart.bars:
            bar = {"type": "bar", "orientation": "h", "x": _short([dot.mean]), "y": [label], "width": 0.55}
            data.append({**_of(dot.place, dot.label), **bar, "marker": {"color": _colour(dot.place)}})
        else:
            if dot.values:
                faint = {**_marker(dot.place, 7), "opacity": 0.5}
                many = {"x": _short(dot.values), "y": [label] * len(dot.values), "showlegend": False}
                data.append({**_of(dot.place, dot.label), "mode": "markers", **many, "marker": faint})
            data.append(
                {
                    **_of(dot.place, dot.label),
                    "mode": "markers",
                    "x": _short([dot.mean]),
                    "y": [label],
                    "marker": _marker(dot.place, 11),
                    "error_x": _error(dot),
                }
            )
        data[-1]["hovertemplate"] = "%{fullData.name}<br>%{x:.4g}<extra></extra>"
    layout = _layout(chart, 110 + 44 * len(chart.dots))
    layout["yaxis"].update(type="category", categoryarray=labels[::-1], categoryorder="array", showgrid=False)
    layout["xaxis"].update(zeroline=chart.zero, zerolinecolor="@muted", zerolinewidth=1.5)
    if chart.bars:
        layout["xaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": layout}


def _scaled(grid: Grid, chart: Landscapes) -> list[list[float | None]]:
    def scale(value: float | None) -> float | None:
        if value is None or not chart.log:
            return value
        return math.log10(value) if value > 0 else None

    return [_short([scale(value) for value in row]) for row in grid.loss]


def _height(chart: Landscapes) -> dict[str, Any]:
    low, high = (math.log10(chart.low), math.log10(chart.high)) if chart.log else (chart.low, chart.high)
    return {"range": [low, high if high > low else low + 1], "text": "log10 of the loss" if chart.log else "loss"}


def _levels(low: float, high: float) -> Figure:
    """Some fifteen contours at round levels."""
    rough = (high - low) / 15
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return {"start": math.floor(low / size) * size, "end": high, "size": size}


def _surface(grid: Grid, chart: Landscapes) -> Figure:
    height = _height(chart)
    low, high = height["range"]
    contours = _levels(low, high)
    surface = {
        **_of(grid.place, grid.label),
        "type": "surface",
        "x": _short(grid.x),
        "y": _short(grid.y),
        "z": _scaled(grid, chart),
        "cmin": low,
        "cmax": high,
        "colorscale": "Cividis",
        "showscale": False,
        "contours": {"z": {"show": True, **contours, "color": "@contour"}},
        "lighting": {"ambient": 0.75, "diffuse": 0.5, "specular": 0.05},
        "hovertemplate": f"%{{x:.3g}}, %{{y:.3g}}: {height['text']} %{{z:.4g}}<extra></extra>",
    }
    axis = {"color": "@muted", "gridcolor": "@grid", "showbackground": False, "zeroline": False, "nticks": 4}
    axis["tickfont"] = {"size": 11}
    scene = {
        "xaxis": {**axis, "title": {"text": ""}},
        "yaxis": {**axis, "title": {"text": ""}},
        "zaxis": {**axis, "title": {"text": height["text"]}, "range": height["range"]},
        "aspectmode": "manual",
        "aspectratio": {"x": 1, "y": 1, "z": 0.8},
        "camera": {"eye": {"x": 1.25, "y": -1.25, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.1}},
        "dragmode": "turntable",
    }
    margin = {"l": 0, "r": 0, "t": 0, "b": 0}
    return {"data": [surface], "layout": {**_plain(330), "scene": scene, "margin": margin}}


def _map(grid: Grid, chart: Landscapes) -> Figure:
    height = _height(chart)
    low, high = height["range"]
    data: list[Figure] = [
        {
            **_of(grid.place, grid.label),
            "type": "contour",
            "x": _short(grid.x),
            "y": _short(grid.y),
            "z": _scaled(grid, chart),
            "zmin": low,
            "zmax": high,
            "colorscale": "Cividis",
            "autocontour": False,
            "contours": _levels(low, high),
            "line": {"width": 0.5, "color": "@contour"},
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": "@muted"}},
            "hovertemplate": f"%{{x:.3g}}, %{{y:.3g}}: {height['text']} %{{z:.4g}}<extra></extra>",
        }
    ]
    if grid.points:
        data.append(
            {
                **_of(grid.place, grid.label),
                "mode": "markers+text",
                "x": _short([x for _, x, _ in grid.points]),
                "y": _short([y for _, _, y in grid.points]),
                "text": [html.escape(name) for name, _, _ in grid.points],
                "textposition": "top center",
                "textfont": {"color": "#FFFFFF"},
                "marker": {"color": "#FFFFFF", "size": 8, "line": {"color": "#000000", "width": 1}},
                "hoverinfo": "text",
            }
        )
    layout = _layout(chart, 330)
    layout["xaxis"].update(showgrid=False, nticks=5)
    layout["yaxis"].update(showgrid=False, nticks=5, scaleanchor="x", constrain="domain")
    layout["xaxis"]["constrain"] = "domain"
    return {"data": data, "layout": layout}


def _of(place: int, label: str) -> Figure:
    """What tells Plotly, and the page's buttons, to which row a trace belongs."""
    return {"type": "scatter", "name": html.escape(label), "meta": {"row": place}}


def _colour(place: int, opacity: float = 1.0) -> str:
    colour = f"@{style(place).colour}"
    return colour if opacity == 1.0 else f"{colour}/{opacity:g}"


def _marker(place: int, size: int, **more: Any) -> Figure:
    return {
        "color": _colour(place),
        "symbol": style(place).marker,
        "size": size * _SIZES.get(style(place).marker, 1),
        "line": {"color": "@paper", "width": 1},
        **more,
    }


def _error(dot: Dot) -> Figure:
    bar = {"color": _colour(dot.place), "thickness": 1.75, "width": 5}
    return {"type": "data", "array": _short([dot.half]), "visible": dot.half is not None, **bar}


def _plain(height: int) -> Figure:
    return {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": "@ink"},
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "showlegend": False,
    }


def _layout(chart: Chart, height: int) -> Figure:
    axis = {"gridcolor": "@grid", "linecolor": "@muted", "zeroline": False, "automargin": True, "fixedrange": True}
    quiet = {"tickcolor": "@grid", "tickfont": {"color": "@muted"}}

    def title(text: str) -> Figure:
        font = {"size": 13, "color": "@muted"}
        return {"text": html.escape(text), "font": font, "standoff": 8}

    return {
        **_plain(height),
        "dragmode": False,
        "margin": {"l": 8, "r": 12, "t": 14, "b": 8},
        "xaxis": {**axis, **quiet, "title": title(chart.x), "showgrid": False, "showline": True},
        "yaxis": {**axis, **quiet, "title": title(chart.y)},
    }


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Numbers to six significant digits: what is drawn does not need more, and the file is shorter."""
    return [None if value is None else float(f"{value:.6g}") for value in values]
