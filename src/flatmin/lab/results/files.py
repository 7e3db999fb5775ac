"""The names of the files that flatmin leaves."""

from collections.abc import Iterable

CONFIG, METRICS, EXPERIMENT = "config.json", "metrics.jsonl", "experiment.py"
SHARPNESS, LANDSCAPE = "sharpness.json", "landscape.json"
LAST, PREVIOUS, BEST = "checkpoints/last", "checkpoints/previous", "checkpoints/best"
RESULTS, REPORT, RUNS, SELECTION = "results.json", "report.html", "runs", "selection"


def run_name(label: str, seed: int) -> str:
    """The folder's name of a row's run.

    Example:
        >>> from flatmin.lab.results import run_name
        >>> run_name("saf lag=2", 0)
        'saf-lag=2-seed0'
    """
    return f"{label.replace(' ', '-')}-seed{seed}"


def parse_run_name(name: str, labels: Iterable[str]) -> tuple[str, int] | None:
    """The label and the seed of a run's folder; None if it belongs to none of these rows.

    Example:
        >>> from flatmin.lab.results import parse_run_name
        >>> parse_run_name("saf-lag=2-seed0", ["base", "saf lag=2"])
        ('saf lag=2', 0)
    """
    start, _, seed = name.rpartition("-seed")
    found = [label for label in labels if label.replace(" ", "-") == start]
    return (found[0], int(seed)) if found and seed.isdecimal() else None
