"""The benchmark of runs at a time works from end to end."""

import json
import sys

from benchmarks import runs_at_a_time


def test_runs_at_a_time(tmp_path, monkeypatch, forked_workers):
    out = tmp_path / "out.json"
    options = ["--epochs", "3", "--device", "cpu", "--jobs", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["runs_at_a_time.py", *options])
    runs_at_a_time.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["jobs"] == 2
    assert not row["by_turns"]  # which a CPU never is
    assert row["epoch"] == 2 * row["epoch_of_each_run"] > 0
