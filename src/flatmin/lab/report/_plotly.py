"""Charts as Plotly's figures, in plain dictionaries."""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from ._charts import Chart, Cost, Curves, Dot, Landscapes, Strip
from ._plotly_landscapes import contours, surface
from ._plotly_parts import Figure, colour_of, error, layout, marker, of, short
from ._style import style

_MOST_NAMED = 8  # dots that carry their names beside them; of more, only the base and those on the front do
_FEW_DECADES = 2


def figures(chart: Chart) -> list[Figure]:
    """A chart's figures: one, or for landscapes a surface and a map for each row."""
    if isinstance(chart, Landscapes):
        return [draw(grid, chart) for grid in chart.grids for draw in (surface, contours)]
    draw: dict[type[Chart], Callable[[Any], Figure]] = {Curves: _curves, Cost: _cost, Strip: _strip}
    return [draw[type(chart)](chart)]


def _curves(chart: Curves) -> Figure:
    data = []
    for line in chart.lines:
        if line.low:
            data.append(
                {
                    **of(line.place, line.label),
                    "mode": "lines",
                    "x": short([*line.x, *reversed(line.x)]),
                    "y": short([*line.high, *reversed(line.low)]),
                    "fill": "toself",
                    "fillcolor": colour_of(line.place, 0.16),
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                }
            )
    for line in chart.lines:
        look = style(line.place)
        data.append(
            {
                **of(line.place, line.label),
                "mode": "lines+markers" if len(line.x) > 1 else "markers",
                "x": short(line.x),
                "y": short(line.y),
                "line": {"color": colour_of(line.place), "width": 2, "dash": look.dash},
                "marker": marker(line.place, 7, maxdisplayed=9),
                "hovertemplate": "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
            }
        )
    axes = layout(chart, 340)
    axes["hovermode"] = "closest"
    if chart.log:
        axes["yaxis"].update(type="log", **_ticks(chart))
    if chart.level is not None:
        line_style = {"color": "@muted", "width": 1, "dash": "dot"}
        axes["shapes"] = [
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
    return {"data": data, "layout": axes}


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
            "x": short([dot.cost for dot in front]),
            "y": short([dot.mean for dot in front]),
            "line": {"color": "@muted", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    few = len(chart.dots) <= _MOST_NAMED
    named = [dot for dot in chart.dots if few or dot.on_front or not dot.place]
    places = _text_places(named)
    for dot in chart.dots:
        data.append(
            {
                **of(dot.place, dot.label),
                "mode": "markers+text" if dot.place in places else "markers",
                "x": short([dot.cost]),
                "y": short([dot.mean]),
                "text": [html.escape(dot.label)],
                "textposition": places.get(dot.place, "middle right"),
                "textfont": {"color": "@ink"},
                "marker": marker(dot.place, 12 if dot.on_front else 10),
                "error_y": error(dot),
                "cliponaxis": False,
                "hovertemplate": "%{fullData.name}<br>%{x:.2f} x, %{y:.2f} %<extra></extra>",
            }
        )
    axes = layout(chart, 470)
    low, high = min(dot.cost for dot in chart.dots), max(dot.cost for dot in chart.dots)
    pad = (high - low) or 1.0
    axes["xaxis"].update(ticksuffix="x", range=[low - 0.08 * pad, high + 0.2 * pad])
    return {"data": data, "layout": axes}


def _text_places(dots: Sequence[Dot]) -> dict[int, str]:
    """Names to the right of their dots, above or below where another would be in the way."""
    wide = max(dot.cost for dot in dots) - min(dot.cost for dot in dots) or 1.0
    tall = max(dot.mean for dot in dots) - min(dot.mean for dot in dots) or 1.0
    places = {}
    for dot in dots:
        near = [
            other for other in dots
            if other is not dot and abs(other.mean - dot.mean) < 0.1 * tall and 0 <= other.cost - dot.cost < 0.25 * wide
        ]  # fmt: skip
        below = any(other.mean > dot.mean for other in near)
        places[dot.place] = "middle right" if not near else "bottom right" if below else "top right"
    return places


def _strip(chart: Strip) -> Figure:
    data: list[Figure] = []
    labels = [html.escape(dot.label) for dot in chart.dots]
    for dot, label in zip(chart.dots, labels, strict=True):
        if chart.bars:
            bar = {"type": "bar", "orientation": "h", "x": short([dot.mean]), "y": [label], "width": 0.55}
            data.append({**of(dot.place, dot.label), **bar, "marker": {"color": colour_of(dot.place)}})
        else:
            if dot.values:
                faint = {**marker(dot.place, 7), "opacity": 0.5}
                many = {"x": short(dot.values), "y": [label] * len(dot.values), "showlegend": False}
                data.append({**of(dot.place, dot.label), "mode": "markers", **many, "marker": faint})
            data.append(
                {
                    **of(dot.place, dot.label),
                    "mode": "markers",
                    "x": short([dot.mean]),
                    "y": [label],
                    "marker": marker(dot.place, 11),
                    "error_x": error(dot),
                }
            )
        data[-1]["hovertemplate"] = "%{fullData.name}<br>%{x:.4g}<extra></extra>"
    axes = layout(chart, 110 + (44 if len(chart.dots) <= _MOST_NAMED else 28) * len(chart.dots))
    axes["yaxis"].update(type="category", categoryarray=labels[::-1], categoryorder="array", showgrid=False)
    axes["xaxis"].update(zeroline=chart.zero, zerolinecolor="@muted", zerolinewidth=1.5)
    if chart.bars:
        axes["xaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": axes}
