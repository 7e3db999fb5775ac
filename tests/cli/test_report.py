"""``flatmin report`` from the command line, and the report that a comparison ends with."""

import importlib.util
import json
from pathlib import Path

import pytest

import flatmin.cli._report as command
from flatmin.errors import FlatminWarning

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_on_a_results_file_of_this_repository(flatmin):
    found = flatmin("report", RESULTS / "digits.json", "--out", "page.html")
    assert (found.code, found.err) == (0, "")
    assert found.out == "The report, for any browser: page.html\n"
    assert "--tensorboard" in flatmin("report", "--help").out
    assert "Better than base beyond noise here: smoothing (+0.63 points" in Path("page.html").read_text()


@pytest.mark.parametrize("source", ["nothing", str(RESULTS / "overhead-cpu.json"), str(RESULTS)])
def test_what_it_cannot_use_is_one_line(flatmin, source):
    found = flatmin("report", source)
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert source in found.err


def test_a_report_that_fails_costs_a_comparison_nothing(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({}))
    with pytest.warns(FlatminWarning, match="the report could not be written: .*holds no comparison"):
        assert command.report_on(tmp_path) is None


def test_without_plotly_a_comparison_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.report_on(tmp_path) is None


def test_with_figures_and_tensorboard(flatmin, experiment):
    pytest.importorskip("tensorboard")
    assert flatmin("train", experiment(), "--epochs", "2", "--out", "run").code == 0
    found = flatmin("report", "run", "--figures", "figures", "--tensorboard", "events")
    assert (found.code, found.err) == (0, "")
    assert "1 run for tensorboard --logdir events" in found.out
    assert len(list(Path("events").glob("*-seed0/events.out.tfevents.*"))) == 1
    assert Path("figures", "test_accuracy.svg").exists()
