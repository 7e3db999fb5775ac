"""Charts as files for a paper: SVG and PNG, drawn by matplotlib."""

import io
from collections.abc import Callable
from typing import Any

from ...errors import require
from ._charts import Chart, Cost, Curves, Dot, Landscapes, Strip
from ._style import COLOURS, style

_INCHES = (5.5, 3.8)


def draw(chart: Chart, mark: str) -> dict[str, bytes]:
    """Draws a chart and returns the content of its files by their endings, ``svg`` and ``png``.

    Args:
        chart: What to draw.
        mark: Written into both, so that they are known again.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figures = require("matplotlib.figure", install="flatmin[report]")
    figure = figures.Figure(figsize=_INCHES, layout="constrained")
    drawers: dict[type[Chart], Callable[[Any, Any], None]] = {
        Curves: _curves,
        Cost: _cost,
        Strip: _strip,
        Landscapes: _landscapes,
    }
    drawers[type(chart)](figure, chart)
    found = {}
    for ending, metadata in (("svg", {"Creator": mark, "Date": None}), ("png", {"Software": mark})):
        file = io.BytesIO()
        figure.savefig(file, format=ending, dpi=200, metadata=metadata)
        found[ending] = file.getvalue()
    return found


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no formula


def _axes(figure: Any, chart: Chart) -> Any:
    axes = figure.subplots()
    axes.set_xlabel(_plain(chart.x))
    axes.set_ylabel(_plain(chart.y))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curves(figure: Any, chart: Curves) -> None:
    axes = _axes(figure, chart)
    for line in chart.lines:
        look = style(line.place)
        colour = COLOURS[look.colour]
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        marked = max(len(line.x) // 9, 1)
        drawn = {"linestyle": look.line_style, "marker": look.marker_style, "markersize": 4, "markevery": marked}
        axes.plot(line.x, line.y, color=colour, label=_plain(line.label), **drawn)
    if chart.log:
        axes.set_yscale("log")
    if chart.level is not None:
        axes.axhline(chart.level, color="grey", linewidth=1, linestyle=":")
    axes.legend(frameon=False, fontsize="small")


def _look(dot: Dot) -> dict[str, Any]:
    look = style(dot.place)
    return {"color": COLOURS[look.colour], "marker": look.marker_style, "linestyle": "none"}


def _cost(figure: Any, chart: Cost) -> None:
    axes = _axes(figure, chart)
    axes.plot([dot.cost for dot in chart.front], [dot.mean for dot in chart.front], color="grey", linestyle=":")
    for dot in chart.dots:
        error = None if dot.half is None else [dot.half]
        axes.errorbar([dot.cost], [dot.mean], yerr=error, capsize=3, label=_plain(dot.label), **_look(dot))
    axes.legend(frameon=False, fontsize="small")


def _strip(figure: Any, chart: Strip) -> None:
    axes = _axes(figure, chart)
    places = range(len(chart.dots))
    for place, dot in zip(places, chart.dots, strict=True):
        if chart.bars:
            axes.barh([place], [dot.mean], height=0.55, color=COLOURS[style(dot.place).colour])
            continue
        axes.plot(dot.values, [place] * len(dot.values), alpha=0.4, markersize=4, **_look(dot))
        error = None if dot.half is None else [dot.half]
        axes.errorbar([dot.mean], [place], xerr=error, capsize=3, **_look(dot))
    axes.set_yticks(places, [_plain(dot.label) for dot in chart.dots])
    axes.invert_yaxis()
    if chart.zero:
        axes.axvline(0, color="grey", linewidth=1)


def _landscapes(figure: Any, chart: Landscapes) -> None:
    """Maps beside each other on one scale: what a page turns, paper shows from above."""
    numpy = require("numpy", install="flatmin[report]")
    colours = require("matplotlib.colors", install="flatmin[report]")
    count = len(chart.grids)
    columns = min(count, 3)
    figure.set_size_inches(3.2 * columns + 0.8, 3.0 * -(-count // columns))
    scale = (colours.LogNorm if chart.log else colours.Normalize)(chart.low, chart.high)
    panes = figure.subplots(-(-count // columns), columns, squeeze=False)
    for grid, axes in zip(chart.grids, panes.flat, strict=False):
        loss = numpy.ma.masked_invalid(numpy.array(grid.loss, dtype=float))
        mesh = axes.pcolormesh(grid.x, grid.y, loss, norm=scale, cmap="cividis", shading="nearest", rasterized=True)
        for name, x, y in grid.points:
            axes.plot([x], [y], "wo", markeredgecolor="black")
            axes.annotate(_plain(name), (x, y), color="white")
        axes.set_title(_plain(grid.label), fontsize="medium")
        axes.set_aspect("equal")
    for axes in panes.flat[count:]:
        axes.set_visible(False)
    figure.colorbar(mesh, ax=panes, label="loss")
