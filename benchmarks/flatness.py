"""Do SAF and MESA flatten the minimum as SAM does? Every measure on the final network of every run of a comparison.

    python benchmarks/flatness.py --problem digits --seeds 5 --out benchmarks/results/flatness-digits.json
    python benchmarks/flatness.py --problem mnist1d --seeds 5 --out benchmarks/results/flatness-mnist1d.json

``--runs FOLDER`` takes a finished comparison in place of training one. The result has every seed's numbers, differences
to the base paired by seed with 95 % intervals, and the rank correlation of each measure with the test accuracy over all
runs: over methods and seeds together, so that it tells nothing of causes.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.comparison.stats import interval
from flatmin.lab.recipe import Recipe
from flatmin.lab.results import LAST
from flatmin.lab.runs.record import command_line, environment, write_json
from flatmin.lab.runs.saved import open_saved
from flatmin.lab.runs.sharpness import NOTE, measures
from flatmin.lab.training.logged_sharpness import fixed_batches
from flatmin.sharpness import Objective

METHODS = "base,smoothing,sam,saf,mesa"
PROBLEMS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 60},
    "mnist1d": {"data": "mnist1d", "model": "cnn1d", "label_noise": 0.2, "epochs": 40},
}


def measure(folder: Path, samples: int, rho: float) -> tuple[str, int, dict[str, float]]:
    """Returns the label of a run's row, its seed, and its numbers by name."""
    saved = open_saved(folder)
    objective = Objective(saved.model, saved.loss_fn, fixed_batches(saved.problem, samples, 0, saved.device))
    found = measures(objective, rho=rho, trace=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    numbers = {f"{entry.name} {entry.logits}": entry.value for entry in found.measures}
    numbers |= {"test_accuracy": 100 * last["test_accuracy"], "train_loss": found.loss}
    return folder.name.rpartition("-seed")[0], saved.run.seed, numbers


def summarise(values: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Means, paired differences to the base and rank correlations, over the seeds that every row has."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values.values())))
    names = list(values["base"][seeds[0]])
    rows = {
        label: {
            name: {
                "mean": asdict(interval([by_seed[seed][name] for seed in seeds])),
                "difference": asdict(interval([by_seed[s][name] - values["base"][s][name] for s in seeds])),
            }
            for name in names
        }
        for label, by_seed in values.items()
    }
    runs = [by_seed[seed] for by_seed in values.values() for seed in seeds]
    correlations = {}
    for name in names:
        if name != "test_accuracy":
            found = spearmanr([run[name] for run in runs], [run["test_accuracy"] for run in runs])
            correlations[name] = {"rho": float(found.statistic), "p_value": float(found.pvalue), "runs": len(runs)}
    return {"seeds": seeds, "rows": rows, "rank_correlation_with_accuracy": correlations}


def main() -> None:
    """Trains if need be, measures, writes the result after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--runs", type=Path, help="a finished comparison, in place of training")
    parser.add_argument("--methods", default=METHODS, help="with commas, base among them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="in place of the problem's own")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1024, help="training samples to measure on")
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.runs or Path(made)
        if given.runs is None:
            recipe = Recipe(**{**PROBLEMS[given.problem], **({"epochs": given.epochs} if given.epochs else {})})
            rows = make_rows(given.methods.split(","), {}, epochs=recipe.epochs)
            Comparison(recipe, rows, folder, seeds=given.seeds, minutes=0.1, jobs=given.jobs).run()
        config = json.loads((folder / "config.json").read_text())
        values: dict[str, dict[int, dict[str, float]]] = {}
        for run in sorted((folder / "runs").iterdir()):
            if not (run / LAST).exists():
                continue
            label, seed, numbers = measure(run, given.samples, given.rho)
            values.setdefault(label, {})[seed] = numbers
            print(f"{label}, seed {seed}: {numbers['sam_sharpness raw']:.4g} raw", flush=True)
    result = {
        "command": f"python benchmarks/{command_line()}",
        **environment(),
        "recipe": config["recipe"],
        "samples": given.samples,
        "note": NOTE,
        **summarise(values),
        "runs": {label: {str(seed): v for seed, v in by_seed.items()} for label, by_seed in values.items()},
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()
