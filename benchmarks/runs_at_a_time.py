"""How many runs a device trains best at a time: seconds of an epoch, by ``--jobs``.

A GPU that a small network leaves idle trains several seeds at a time, each in a process of its own, as ``flatmin
compare --jobs`` does: side by side under NVIDIA's MPS, which it starts, and by turns without. Both are measured.

    python benchmarks/runs_at_a_time.py --data idx:fashion-mnist --model resnet18 --precision bfloat16 --device cuda ...
"""

import argparse
import json
import os
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from flatmin import lab
from flatmin.lab.comparison.gpu_sharing import KINDS, PIPE
from flatmin.lab.runs.record import command_line, environment
from flatmin.lab.training.device import resolve_device

WARM = 2  # epochs at the start of a run that do not count: they compile, choose algorithms and wait for other runs


def measure(recipe: lab.Recipe, jobs: int, folder: Path, *, turns: bool) -> dict[str, Any]:
    """Trains ``jobs`` seeds at a time, at least two; the seconds of an epoch, and of an epoch for each run."""
    with patch.dict(os.environ, {PIPE: "/dev/null"} if turns else {}):
        lab.compare(recipe, methods=["base"], seeds=max(jobs, 2), jobs=jobs, out=folder)
    runs = [path.read_text().splitlines() for path in sorted(folder.glob("runs/*/metrics.jsonl"))]
    seconds = [json.loads(line)["seconds"] for lines in runs for line in lines[WARM:]]
    return {"jobs": jobs, "by_turns": turns, "epoch": median(seconds), "epoch_of_each_run": median(seconds) / jobs}


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
    shared = resolve_device(recipe.device).type in KINDS
    for number, turns in product(jobs, (False, True) if shared else (False,)):
        if number == 1 and turns:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(recipe, number, Path(folder) / "runs", turns=turns))
        print(json.dumps(rows[-1]), flush=True)
    out.write_text(json.dumps({"command": command_line(), **environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
