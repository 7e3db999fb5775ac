"""How many runs a device trains best at a time: seconds of an epoch, by ``--jobs``.

A GPU that a small network leaves idle trains several seeds at a time, each in a process of its own, as ``flatmin
compare --jobs`` does. Processes share a GPU by turns; under NVIDIA's MPS (``nvidia-cuda-mps-control -d``) their kernels
also run side by side: measure with and without it.

    python benchmarks/runs_at_a_time.py --data idx:fashion-mnist --model resnet18 --precision bfloat16 --device cuda ...
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from flatmin import lab
from flatmin.lab.runs.record import command_line, environment

WARM = 2  # epochs at the start of a run that do not count: they compile, choose algorithms and wait for other runs


def measure(recipe: lab.Recipe, jobs: int, folder: Path) -> dict[str, Any]:
    """Trains ``jobs`` seeds at a time, at least two; the seconds of an epoch, and of an epoch for each run."""
    lab.compare(recipe, methods=["base"], seeds=max(jobs, 2), jobs=jobs, out=folder)
    runs = [path.read_text().splitlines() for path in sorted(folder.glob("runs/*/metrics.jsonl"))]
    seconds = [json.loads(line)["seconds"] for lines in runs for line in lines[WARM:]]
    return {"jobs": jobs, "epoch": median(seconds), "epoch_of_each_run": median(seconds) / jobs}


def main() -> None:
    """Measures each number of runs, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--jobs", default="1,2,4,8", help="numbers of runs at a time, separated by commas")
    parser.add_argument("--out", type=Path, required=True)
    arguments = vars(parser.parse_args())
    out, jobs = arguments.pop("out"), [int(number) for number in arguments.pop("jobs").split(",")]
    if arguments["epochs"] <= WARM:
        parser.error(f"--epochs must be more than {WARM}, got {arguments['epochs']}: so many do not count")
    recipe = lab.Recipe(**arguments)
    rows = []
    for number in jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(recipe, number, Path(folder) / "runs"))
        print(json.dumps(rows[-1]), flush=True)
    out.write_text(json.dumps({"command": command_line(), **environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
