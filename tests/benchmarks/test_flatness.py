"""The benchmark of flatness runs from end to end, on two seeds and two epochs."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flatness.py"


def test_flatness(tmp_path, monkeypatch, forked_workers):
    spec = importlib.util.spec_from_file_location("benchmark_flatness", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out = tmp_path / "out.json"
    options = ["--methods", "base,sam", "--seeds", "2", "--epochs", "1", "--samples", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    benchmark.main()
    found = json.loads(out.read_text())
    assert found["seeds"] == [0, 1]
    assert found["rows"].keys() == {"base", "sam"}
    for name in ("sam_sharpness raw", "top_eigenvalue normalised", "hessian_trace raw"):
        values = [found["runs"]["sam"][seed][name] - found["runs"]["base"][seed][name] for seed in "01"]
        assert abs(found["rows"]["sam"][name]["difference"]["mean"] - sum(values) / 2) < 1e-9
        assert found["rank_correlation_with_accuracy"][name]["runs"] == 4
