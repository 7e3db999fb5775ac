"""The page: one HTML file with all that it needs, from its templates in ``page/``.

Everything that comes from files is the user's: Jinja escapes it in the page, `tojson` in the script's data, `_plotly`
in the labels that Plotly draws. A content security policy forbids any request and any script but the page's own two, by
their digests, so that what might slip through would do nothing.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import require
from ..results import judge, pareto
from ..results.values import say_bytes
from . import _words
from ._after import HOW, after_charts, after_tables
from ._charts import Chart, Cost, Curves, Landscapes, Table
from ._curves import curve_charts
from ._landscapes import landscape_charts
from ._plotly import figures
from ._results import result_charts
from ._sharpness import CAUTION, measure_tables, spectrum_charts
from ._study import Json, Study
from ._style import style
from ._verdict import MANY, split_verdict

MARK = "flatmin report"
_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Section:
    """A study with its charts by chapter."""

    study: Study
    results: Sequence[Chart]
    after: Sequence[Chart]
    after_measures: Sequence[tuple[str, Table]]
    curves: Sequence[Chart]
    landscapes: Sequence[Chart]
    spectra: Sequence[Chart]
    measures: Sequence[tuple[str, Table]]

    @property
    def charts(self) -> list[Chart]:
        """All of them, in the order of the page."""
        return [*self.results, *self.after, *self.curves, *self.landscapes, *self.spectra]


def make_section(study: Study) -> Section:
    """Makes a study's charts, those for which it has numbers."""
    return Section(
        study,
        result_charts(study),
        after_charts(study),
        after_tables(study),
        curve_charts(study),
        landscape_charts(study),
        spectrum_charts(study),
        measure_tables(study),
    )


def make_page(sections: Sequence[Section], version: str) -> str:
    """The page as text.

    Args:
        sections: From `make_section`.
        version: flatmin's, for the foot of the page.

    Raises:
        MissingDependencyError: If Plotly or Jinja is not installed.
    """
    jinja2 = require("jinja2", install="flatmin[report]")
    markup = require("markupsafe", install="flatmin[report]").Markup
    plotly = require("plotly.offline", install="flatmin[report]").get_plotlyjs().replace("</script", "<\\/script")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=_words.say_interval,
        points=lambda interval: _words.say_interval(interval, signed=True),
        bytes=_words.say_size,
        p=_words.say_p,
    )
    drawn = {
        f"s{number}-{chart.key}{_suffix(chart, place)}": figure
        for number, section in enumerate(sections, start=1)
        for chart in section.charts
        for place, figure in enumerate(figures(chart))
    }
    own = (_FOLDER / "page.js").read_text(encoding="utf-8")
    values: dict[str, Any] = {
        "sections": sections,
        "version": version,
        "mark": MARK,
        "caution": CAUTION,
        "how_after": HOW,
        "plotly": markup(plotly),
        "script": markup(own),
        "css": markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        "digests": [_digest(plotly), _digest(own)],
        "figures": drawn,
        "script_size": say_bytes(len(plotly.encode())),
        "style": style,
        "symbols": _SYMBOLS,
        "dashes": _DASHES,
        "judge": judge,
        "split": split_verdict,
        "wide": _wide,
        "shown": _shown,
        "flat": _flat,
        "is_landscape": lambda chart: isinstance(chart, Landscapes),
        "is_curves": lambda chart: isinstance(chart, Curves),
    }
    template = environment.get_template("page.html")
    size = len(template.render(**values, size="0.0 MB").encode())
    return str(template.render(**values, size=say_bytes(size))).lstrip()


def _wide(charts: Sequence[Chart]) -> set[str]:
    """Keys of the charts that take a whole line: the large ones, and what would else leave a gap beside it."""
    wide: set[str] = set()
    alone: Chart | None = None
    for chart in charts:
        if isinstance(chart, (Cost, Landscapes)):
            wide |= {chart.key} | ({alone.key} if alone else set())
            alone = None
        else:
            alone = chart if alone is None else None
    return wide | ({alone.key} if alone else set())


def _shown(study: Study) -> set[str]:
    """Labels of the rows that curves show at first: all, or of many the base and those that no other betters."""
    front = [row.label for row in pareto(study.rows)]
    if len(study.rows) - 1 <= MANY or not front:
        return {row.label for row in study.rows}
    return {study.rows[0].label, *front}


def _suffix(chart: Chart, place: int) -> str:
    """Which row's figure it is, and whether surface or map, where a chart has several."""
    return f"-{place // 2}-{'map' if place % 2 else 'surface'}" if isinstance(chart, Landscapes) else ""


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _flat(values: Json, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Names and values for a table; those that are None or not wanted left out."""
    kept = {name: value for name, value in values.items() if value is not None and name not in without}
    return [(name.replace("_", " "), _value(value)) for name, value in kept.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items() if item is not None)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# The markers and dashes of `_style` as paths about (0, 0) and as SVG's dash arrays, for the keys beside names.
_SYMBOLS = {
    "circle": "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "square": "M-4-4h8v8h-8z",
    "diamond": "M0-5.4l5.4 5.4l-5.4 5.4l-5.4-5.4z",
    "triangle-up": "M0-5l5 8.6h-10z",
    "cross": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "x": "M-4.7-2.4l2.3-2.3l2.4 2.3l2.4-2.3l2.3 2.3l-2.3 2.4l2.3 2.4l-2.3 2.3l-2.4-2.3l-2.4 2.3l-2.3-2.3l2.3-2.4z",
    "star": "M0-5.8l1.7 3.9l4.3.3l-3.3 2.7l1.1 4.1l-3.8-2.3l-3.8 2.3l1.1-4.1l-3.3-2.7l4.3-.3z",
    "triangle-down": "M0 5l5-8.6h-10z",
    "pentagon": "M0-5.2l5 3.6l-1.9 5.8h-6.2l-1.9-5.8z",
    "hexagon": "M0-5.2l4.5 2.6v5.2l-4.5 2.6l-4.5-2.6v-5.2z",
}
_DASHES = {
    "solid": "none",
    "dash": "6 3",
    "dashdot": "7 3 2 3",
    "dot": "2 3",
    "longdash": "10 3",
    "longdashdot": "9 3 2 3",
}
