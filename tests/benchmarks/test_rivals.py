"""The table and the plot of the comparison: costs, the Pareto front, and what was chosen at the edge."""

import json
import re
import sys

import pytest

from benchmarks import rivals
from flatmin.lab.methods import FORMER_NAMES

COSTS = rivals.RESULTS / "overhead-cpu.json"


def row(method, accuracy, label=None):
    interval = {"mean": accuracy, "half": 0.1}
    difference = {"mean": accuracy - 90, "half": 0.2}
    numbers = {"accuracy": interval, "difference": difference, "p_value": 0.01, "test_accuracy": [accuracy, accuracy]}
    return {"method": method, "label": label or method, **numbers}


@pytest.fixture
def files(tmp_path):
    recipe = {"model": "cnn1d", "data": "mnist1d", "label_noise": 0.2, "train_samples": 0}
    rows = [
        row("base", 90.0),
        row("latesam", 92.0),
        row("sam", 91.0, "sam rho=0.2"),
        row("saf", 91.5),
    ]
    candidates = [{"label": f"sam rho={rho}", "method": "sam", "chosen": rho == 0.2} for rho in (0.05, 0.1, 0.2)]
    results = {
        "recipe": recipe,
        "seeds": [0, 1],
        "rows": rows,
        "metrics": {"latesam": {"0": {"mean_closure_calls": 1.2}, "1": {"mean_closure_calls": 1.4}}},
        "selection": {"candidates": candidates},
    }
    plain = {"ratio_of_a_step_that_does_not_pay": None}
    costs = [
        {"method": "base", "ratio": 1.0, **plain},
        {"method": "sam", "ratio": 2.0, **plain},
        {"method": "latesam", "ratio": 2.0, "ratio_of_a_step_that_does_not_pay": 1.1},
        {"method": "saf", "ratio": 1.05, **plain},
    ]
    paths = tmp_path / "rivals.json", tmp_path / "costs.json"
    paths[0].write_text(json.dumps(results))
    cases = [{"model": "cnn", "image": [1, 8, 8], "rows": []}, {"model": "cnn1d", "image": [1, 40], "rows": costs}]
    paths[1].write_text(json.dumps({"cases": cases}))
    return paths


def test_costs_front_and_edges(files):
    ((_, points),) = rivals.read_all([files[0]], files[1])
    assert [point.method for point in points] == ["base", "late_sam", "saf", "sam"]
    assert [point.cost for point in points] == pytest.approx([1.0, 0.3 * 2.0 + 0.7 * 1.1, 1.05, 2.0])
    assert {point.method for point in rivals.front(points)} == {"base", "saf", "late_sam"}
    assert [point.method for point in points if point.at_the_edge] == ["sam"]


def test_where_the_steps_were_not_measured_the_cost_is_that_of_the_comparison(files):
    results, costs = (json.loads(path.read_text()) for path in files)
    results["recipe"].update(model="cnn", experiment="benchmarks/fashion_experiment.py", train_samples=10_000)
    results["recipe"].update(label_noise=0)
    for number, entry in enumerate(results["rows"]):
        entry["step_ratio"] = 1 + number / 10
    assert [point.cost for point in rivals.read(results, costs)] == pytest.approx([1.0, 1.1, 1.3, 1.2])
    assert rivals.title(results) == "Fashion-MNIST, 10,000 images"


def test_the_table_and_the_plot_are_written(files, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rivals.py", str(files[0]), "--costs", str(files[1]), "--out", str(out)])
    rivals.main()
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0] == "### MNIST-1D, 20% wrong labels, 2 seeds"
    assert "| sam rho=0.2 (edge) | 91.00 ± 0.10 | +1.00 ± 0.20 | 0.030 | 2.00x |" in lines
    assert "| **late_sam** | 92.00 ± 0.10 | +2.00 ± 0.20 | 0.030 | 1.37x |" in lines
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


def test_comparisons_of_one_recipe_are_one_if_their_bases_are(files):
    first = json.loads(files[0].read_text())
    other = {**first, "rows": [row("base", 90.0), row("ols", 93.0)], "metrics": {}, "selection": None}
    (whole,) = rivals.merged([first, other])
    assert [entry["method"] for entry in whole["rows"]] == ["base", "latesam", "sam", "saf", "ols"]
    assert [entry["p_value_holm"] for entry in whole["rows"][1:]] == pytest.approx([0.04] * 4)
    apart = {**other, "recipe": {**first["recipe"], "label_noise": 0.0}}
    assert len(rivals.merged([first, apart])) == 2
    with pytest.raises(SystemExit, match="bases that came out differently"):
        rivals.merged([first, {**other, "rows": [row("base", 90.1)]}])


def test_what_was_judged_again_is_paired_with_the_base_that_has_fresh_statistics_too(files):
    first = json.loads(files[0].read_text())
    msam = {**row("msam", 92.0), "test_accuracy": [91.5, 92.5]}
    results = {**first, "rows": [row("base", 90.0), row("mesa", 91.0), msam], "metrics": {"base": {"0": {}}}}
    after = {"fresh": {"values": [90.5, 91.0]}}
    bases = [{**first, "rows": [{**row("base", 90.0), "after": after}]}]
    base, fresh, mesa, again = rivals.against_fresh(results, bases)["rows"]
    assert (base["label"], fresh["label"]) == ("base", rivals.FRESH_BASE)
    assert (fresh["accuracy"]["mean"], fresh["difference"]["mean"]) == pytest.approx((90.75, 0.75))
    assert mesa["difference"] == row("mesa", 91.0)["difference"]
    assert again["difference"]["mean"] == pytest.approx((1.0 + 1.5) / 2)
    every = [each["p_value"] for each in (fresh, mesa, again)]
    assert [each["p_value_holm"] for each in (fresh, mesa, again)] == rivals.holm(every)
    for others in ([], [{**bases[0], "rows": [{**row("base", 90.1), "after": after}]}]):
        with pytest.raises(SystemExit, match="no base with fresh statistics"):
            rivals.against_fresh(results, others)


def test_the_committed_tables_are_those_of_the_committed_results_with_the_names_of_today():
    files = [rivals.RESULTS / f"{name}.json" for name in rivals.COMPARISONS]
    first = rivals.read_all(files, COSTS, rivals.JUDGED_AGAIN)
    assert rivals.tables(first) == (rivals.RESULTS / "rivals.md").read_text()
    for names, file in ((rivals.AVERAGES, "rivals-averages.md"), (rivals.ONE_PASS, "rivals-one-pass.md")):
        assert rivals.tables(rivals.judged_again(names)) == (rivals.RESULTS / file).read_text()
    text = (rivals.RESULTS / "rivals.md").read_text()
    assert not re.search(r"\| \**(ema|msam)\b", text)
    assert "| **sam_on rho=2 (edge)** |" in text
    assert "| look_sam alpha=0.2 rho=0.05 | 94.26 ± 0.62 | +2.20 ± 0.72 | < 0.001 | 1.27x |" in text
    assert not re.search(rf"\b({'|'.join(FORMER_NAMES)})\b", text)
