"""The benchmark of flatness runs from end to end, on two seeds and two epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flatness.py"


def test_flatness(tmp_path):
    out = tmp_path / "out.json"
    options = ["--methods", "base,sam", "--seeds", "2", "--epochs", "1", "--samples", "8", "--out", str(out)]
    subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(out.read_text())
    assert found["seeds"] == [0, 1]
    assert found["rows"].keys() == {"base", "sam"}
    for name in ("sam_sharpness raw", "top_eigenvalue normalised", "hessian_trace raw"):
        values = [found["runs"]["sam"][seed][name] - found["runs"]["base"][seed][name] for seed in "01"]
        assert abs(found["rows"]["sam"][name]["difference"]["mean"] - sum(values) / 2) < 1e-9
        assert found["rank_correlation_with_accuracy"][name]["runs"] == 4
