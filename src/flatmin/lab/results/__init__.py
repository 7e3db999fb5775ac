"""What flatmin leaves on disk: the names of its files, the rows of a comparison, and what they mean.

`flatmin.lab.runs` and `flatmin.lab.comparison` write it, `flatmin.lab.report` reads it. Its files import no torch.

A run is a folder with ``config.json``, ``metrics.jsonl`` (one line an epoch), ``checkpoints/`` and, where they were
measured, ``sharpness.json``, ``landscape.json`` and ``after.json``. A comparison is a folder with ``config.json``,
``results.json``, ``report.html``, and a run in ``runs/LABEL-seedN`` for each row and seed.
"""

from .comparison import ComparisonResult as ComparisonResult
from .comparison import read_comparison as read_comparison
from .files import AFTER_FILE as AFTER_FILE
from .files import BEST as BEST
from .files import CONFIG as CONFIG
from .files import EXPERIMENT as EXPERIMENT
from .files import LANDSCAPE as LANDSCAPE
from .files import LAST as LAST
from .files import METRICS as METRICS
from .files import PREVIOUS as PREVIOUS
from .files import REPORT as REPORT
from .files import RESULTS as RESULTS
from .files import RUNS as RUNS
from .files import SELECTION as SELECTION
from .files import SHARPNESS as SHARPNESS
from .files import parse_run_name as parse_run_name
from .files import run_name as run_name
from .interval import Compared as Compared
from .interval import Interval as Interval
from .judgement import LEAST_SEEDS as LEAST_SEEDS
from .judgement import LEVEL as LEVEL
from .judgement import judge as judge
from .judgement import pareto as pareto
from .judgement import verdict as verdict
from .rows import Row as Row

__all__ = [
    "AFTER_FILE",
    "BEST",
    "CONFIG",
    "Compared",
    "ComparisonResult",
    "EXPERIMENT",
    "Interval",
    "LANDSCAPE",
    "LAST",
    "LEAST_SEEDS",
    "LEVEL",
    "METRICS",
    "PREVIOUS",
    "REPORT",
    "RESULTS",
    "RUNS",
    "Row",
    "SELECTION",
    "SHARPNESS",
    "judge",
    "pareto",
    "parse_run_name",
    "read_comparison",
    "run_name",
    "verdict",
]
