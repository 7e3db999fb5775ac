"""``flatmin report`` from the command line, and the report that a comparison ends with."""

import importlib.util
import json
from pathlib import Path

import pytest

from flatmin.errors import FlatminWarning
from flatmin.lab.comparison.compare import write_page
from flatmin.lab.report._page import make_section
from flatmin.lab.report._read import read_studies

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


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
    with pytest.warns(FlatminWarning, match="the report could not be written: .*not a comparison of flatmin"):
        assert write_page(tmp_path) is None


def test_without_plotly_a_comparison_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_page(tmp_path) is None


def test_with_figures_and_tensorboard(flatmin, experiment):
    pytest.importorskip("tensorboard")
    assert flatmin("train", experiment(), "--epochs", "2", "--out", "run").code == 0
    found = flatmin("report", "run", "--figures", "figures", "--tensorboard", "events")
    assert (found.code, found.err) == (0, "")
    assert "1 run for tensorboard --logdir events" in found.out
    assert len(list(Path("events").glob("*-seed0/events.out.tfevents.*"))) == 1
    assert Path("figures", "test_accuracy.svg").exists()


def test_with_what_sharpness_and_landscape_write(flatmin, experiment):
    logging = ("--log-sharpness", 1, "--log-curvature", 1)
    assert flatmin("train", experiment(), "--epochs", 2, *logging, "--out", "a").code == 0
    measured = flatmin("sharpness", "a", "--eigenvalues", 2, "--trace", "--density", "--samples", 20)
    assert measured.code == flatmin("landscape", "a", "--points", 3).code == 0
    section = make_section(read_studies([Path("a")])[0])
    keys = {chart.key for chart in section.charts}
    logged = {"sharpness", "sharpness_normalised", "gradient_norm", "top_eigenvalue", "lr_times_top_eigenvalue"}
    assert keys >= logged | {"landscape-random", "landscape-profile", "eigenvalues", "spectrum"}
    written = json.loads(Path("a/sharpness.json").read_text())
    assert len(section.measures) == len(written["measures"]) // 2
    assert all("\N{EN DASH}" not in row for _, table in section.measures for row in table.rows)
    assert flatmin("landscape", "a", "--directions", 1, "--points", 3).code == 0
    assert "slice-random" in {chart.key for chart in make_section(read_studies([Path("a")])[0]).charts}
