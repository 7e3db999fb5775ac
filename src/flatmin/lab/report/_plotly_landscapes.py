"""Landscapes as Plotly's figures: a surface to be turned, and a map."""

import html
import math
from typing import Any

from ._charts import Grid, Landscapes
from ._plotly_parts import Figure, layout, of, plain, short


def _scaled(grid: Grid, chart: Landscapes) -> list[list[float | None]]:
    def scale(value: float | None) -> float | None:
        if value is None or not chart.log:
            return value
        return math.log10(value) if value > 0 else None

    return [short([scale(value) for value in row]) for row in grid.loss]


def _height(chart: Landscapes) -> dict[str, Any]:
    low, high = (math.log10(chart.low), math.log10(chart.high)) if chart.log else (chart.low, chart.high)
    return {"range": [low, high if high > low else low + 1], "text": "log10 of the loss" if chart.log else "loss"}


def _levels(low: float, high: float) -> Figure:
    """Some fifteen contours at round levels."""
    rough = (high - low) / 15
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return {"start": math.floor(low / size) * size, "end": high, "size": size}


def surface(grid: Grid, chart: Landscapes) -> Figure:
    """A row's landscape as a surface."""
    height = _height(chart)
    low, high = height["range"]
    levels = _levels(low, high)
    drawn = {
        **of(grid.place, grid.label),
        "type": "surface",
        "x": short(grid.x),
        "y": short(grid.y),
        "z": _scaled(grid, chart),
        "cmin": low,
        "cmax": high,
        "colorscale": "Cividis",
        "showscale": False,
        "contours": {"z": {"show": True, **levels, "color": "@contour"}},
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
        "camera": {"eye": {"x": 1.3, "y": -1.3, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.05}},
        "dragmode": "turntable",
    }
    margin = {"l": 0, "r": 0, "t": 0, "b": 0}
    return {"data": [drawn], "layout": {**plain(300), "scene": scene, "margin": margin}}


def contours(grid: Grid, chart: Landscapes) -> Figure:
    """A row's landscape from above."""
    height = _height(chart)
    low, high = height["range"]
    data: list[Figure] = [
        {
            **of(grid.place, grid.label),
            "type": "contour",
            "x": short(grid.x),
            "y": short(grid.y),
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
                **of(grid.place, grid.label),
                "mode": "markers+text",
                "x": short([x for _, x, _ in grid.points]),
                "y": short([y for _, _, y in grid.points]),
                "text": [html.escape(name) for name, _, _ in grid.points],
                "textposition": "top center",
                "textfont": {"color": "#FFFFFF"},
                "marker": {"color": "#FFFFFF", "size": 8, "line": {"color": "#000000", "width": 1}},
                "hoverinfo": "text",
            }
        )
    axes = layout(chart, 330)
    axes["xaxis"].update(showgrid=False, nticks=5)
    axes["yaxis"].update(showgrid=False, nticks=5, scaleanchor="x", constrain="domain")
    axes["xaxis"]["constrain"] = "domain"
    return {"data": data, "layout": axes}
