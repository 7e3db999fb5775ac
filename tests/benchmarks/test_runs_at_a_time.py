"""The benchmark of runs at a time works from end to end."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "runs_at_a_time.py"


def test_runs_at_a_time(tmp_path, monkeypatch, forked_workers):
    spec = importlib.util.spec_from_file_location("benchmark_runs_at_a_time", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--epochs", "3", "--device", "cpu", "--jobs", "2", "--out", str(out)]
    )
    benchmark.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["jobs"] == 2
    assert row["epoch"] == 2 * row["epoch_of_each_run"] > 0
