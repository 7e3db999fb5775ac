"""The page's content and its figures, without a browser."""

import json
import re
from importlib import resources
from pathlib import Path

import plotly.graph_objects as go
import pytest

from flatmin.lab.report import write_report
from flatmin.lab.report._page import make_section
from flatmin.lab.report._plotly import figures
from flatmin.lab.report._read import read_studies
from flatmin.lab.report._style import style
from flatmin.lab.report._words import NONE

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>{{7*7}}&\"'"


def page(*sources):
    return write_report(sources).read_text(encoding="utf-8")


def text_of(html):
    """The page without its scripts, which are long."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)[1])


def charts(folder):
    return {chart.key: chart for chart in make_section(read_studies([folder])[0]).charts}


def test_the_verdict_comes_first_and_all_chapters_follow(comparison):
    text = text_of(page(comparison()))
    words = (
        "Better than base",
        "Gain and cost",
        "After training",
        "Training, epoch by epoch",
        "Loss landscapes",
        "Sharpness",
        "How it was",
    )
    places = [text.index(word, text.index("<main")) for word in words]
    assert places == sorted(places)
    assert "flatmin compare --seeds 5" in text
    assert re.search(r"One file of \d\.\d MB", text)


@pytest.mark.parametrize(
    "key", ["cost", "differences", "memory", "rounded", "sharpness", "landscape-random", "spectrum"]
)
def test_plotly_knows_every_property_of_the_figures(comparison, key):
    def plain(value):  # a colour in place of the page's own
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return "#123456" if isinstance(value, str) and value.startswith("@") else value

    for figure in figures(charts(comparison())[key]):
        go.Figure(plain(figure))


def test_every_plot_has_its_figure_a_name_and_a_table(comparison):
    html = page(comparison())
    data, text = data_of(html), text_of(html)
    plots = re.findall(
        r'<div class="plot" data-figure="([^"]+)"( data-landscape)?(?: data-curves)?'
        r' role="(?:img|group)" aria-label="[^"]+"',
        text,
    )
    assert len(plots) == text.count('class="plot"') > 15
    wanted = {name + part for name, land in plots for part in (("-surface", "-map") if land else ("",))}
    assert wanted == set(data)
    assert text.count("<details>") == text.count('<figure class="chart')


def test_the_front_is_what_none_betters_in_both(comparison):
    chart = charts(comparison())["cost"]
    assert [dot.label for dot in chart.front] == ["base", "sam", "saf"]
    worse = comparison(name="worse", rows=None)
    written = json.loads((worse.parent / "comparison" / "results.json").read_text())
    written["rows"][1]["accuracy"]["mean"] = 0.0
    (worse / "results.json").write_text(json.dumps(written))
    assert [dot.label for dot in charts(worse)["cost"].front] == ["base", "saf"]


def test_bands_span_the_seeds_and_epochs_without_a_value_are_skipped(comparison):
    found = charts(comparison(seeds=2))
    line = found["train_loss_vanilla"].lines[0]
    assert (line.low[0], line.y[0], line.high[0]) == pytest.approx((2.0, 2.005, 2.01))
    assert list(found["sharpness"].lines[0].x) == [2, 4]
    assert list(found["test_loss"].lines[0].x) == [1, 3, 4]
    assert found["lr_times_top_eigenvalue"].level == 2


def test_what_comes_after_training_stands_beside_what_was_before(comparison):
    text = re.sub(r"\s+", " ", text_of(page(comparison())))
    cells = r"sam</th><td>77.40 ± 0.30</td><td>-20.00</td><td>\+0.20 ± 0.30</td><td>0.010</td>"
    assert re.search(rf"weights rounded to 2 bits</th></tr> .*?{cells}", text)
    assert re.search(r"base</th><td>77.20 ± 0.30</td><td>-20.00</td><td></td><td></td>", text)
    assert "noise of 0.8" not in text
    assert text.count("<td>2.000</td>") == 3
    found = charts(comparison(seeds=2, name="two"))
    line = found["rounded"].lines[1]
    assert (list(line.x), list(line.y)) == ([2.0, 4.0], pytest.approx([77.25, 96.25]))
    assert list(found["noise"].lines[0].x) == [0.0, 0.2]


def test_what_was_measured_of_some_seeds_is_not_set_against_what_was_before_of_all(comparison):
    folder = comparison(seeds=2)
    written = json.loads((folder / "results.json").read_text())
    for row in written["rows"]:
        for each in row["after"].values():
            each["values"].pop()
        row["after"]["fresh"] = {**row["after"]["noise_0.2"], "values": [91.0]}
    (folder / "results.json").write_text(json.dumps(written))
    text = re.sub(r"\s+", " ", text_of(page(folder)))
    assert "rounded to 2 bits (1 of 2 seeds)</th></tr>" in text
    assert re.search(rf"base</th><td>77[^<]*</td><td>{NONE}</td>", text)
    line = charts(folder)["noise"].lines[0]
    assert (list(line.x), line.y[0]) == ([0.0, 0.2], 91.0)  # with fresh statistics, as with noise


def test_a_comparison_of_which_nothing_more_was_measured_has_no_chapter_of_it(comparison):
    text = text_of(page(comparison(sharp=False)))
    assert "After training" not in text
    assert "epsilon" not in text


@pytest.mark.parametrize(
    "value", [[], {"rounded_2": None}, {"other": {"values": [1, None, "x"], "mean": {"mean": "x"}}}]
)
def test_what_is_damaged_of_it_is_left_out(comparison, value):
    folder = comparison(seeds=1)
    written = json.loads((folder / "results.json").read_text())
    written["rows"][1]["after"] = value
    (folder / "results.json").write_text(json.dumps(written))
    assert "weights rounded to 2 bits" in text_of(page(folder))


def test_a_landscape_of_its_corners_alone_has_no_profile(comparison):
    folder = comparison(seeds=1)
    for file in folder.glob("runs/*/landscape.json"):
        file.write_text(json.dumps({"kind": "random", "x": [-1, 1], "y": [-1, 1], "loss": [[1, 2], [3, 4]]}))
    found = charts(folder)
    assert "landscape-random" in found
    assert "landscape-profile" not in found


def test_landscapes_share_one_scale(comparison):
    chart = charts(comparison())["landscape-random"]
    surfaces = figures(chart)[::2]
    assert {tuple(surface["layout"]["scene"]["zaxis"]["range"]) for surface in surfaces} == {(0.1, 0.1 + 3 * 2)}
    assert {(surface["data"][0]["cmin"], surface["data"][0]["cmax"]) for surface in surfaces} == {(0.1, 0.1 + 3 * 2)}


def test_raw_and_normalised_sharpness_stand_side_by_side_with_a_caution(comparison):
    text = text_of(page(comparison()))
    assert '<th scope="col">raw logits</th><th scope="col">normalised logits</th>' in text
    assert "raise the cross-entropy" in text


def test_nothing_that_a_user_names_gets_out_of_its_place(comparison):
    folder = comparison(("base", HOSTILE), seeds=1, command=HOSTILE, verdict=HOSTILE)
    written = json.loads((folder / "results.json").read_text())
    written["recipe"]["data"] = written["versions"][HOSTILE] = written["hardware"]["system"] = HOSTILE
    (folder / "results.json").write_text(json.dumps(written))
    html = page(folder)
    text = text_of(html)
    assert "<img" not in text
    assert html.count("<script") == 3 + html.count("<script", html.index("plotly.js v"), html.rindex("<script>"))
    assert "{{7*7}}" in text
    assert any("&lt;/script&gt;" in trace["name"] for trace in data_of(html)["s1-cost"]["data"])


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_and_two(comparison, seeds):
    text = text_of(page(comparison(seeds=seeds)))
    assert "no claim" in text
    assert "nan" not in text.lower().split()


def test_twenty_rows(comparison):
    labels = ["base", *(f"saf lag={lag}" for lag in range(1, 20))]
    text = text_of(page(comparison(labels, seeds=1, sharp=False)))
    assert text.count('class="method"') == 20


def test_of_many_methods_the_verdict_is_short_and_curves_show_the_front_at_first(comparison):
    labels = ["base", *(f"saf lag={lag}" for lag in range(1, 20))]
    folder = comparison(labels, sharp=False, verdict="Better: " + ", ".join(labels) + ".")
    written = json.loads((folder / "results.json").read_text())
    for row in written["rows"][1:]:
        row.update(step_ratio=2.0, accuracy={"mean": 90.0, "half": 0.1}, p_value_holm=0.5)
    written["rows"][3].update(p_value_holm=0.001, accuracy={"mean": 99.0, "half": 0.1})
    written["rows"][4].update(p_value_holm=0.001, step_ratio=1.5)
    written["rows"][5].update(p_value_holm=0.001, difference={"mean": -1.0, "half": 0.1})
    (folder / "results.json").write_text(json.dumps(written))
    text = text_of(page(folder))
    assert "2 of 19 methods are better than base beyond noise here, 1 is worse, and 16 not told apart." in text
    assert "The most accurate of them: saf lag=4 (+0.80 points at 1.50 times the step)." in text
    assert "Better: " not in text
    pressed = re.findall(r'data-row="(\d+)" aria-pressed="true"', text)
    assert [int(place) for place in pressed] == [0, 3]
    assert text.count("data-show=") == 2


def test_no_chart_leaves_a_gap_beside_it(comparison):
    text = text_of(page(comparison()))
    for part in text.split('<div class="charts">')[1:]:
        narrow = [found == "" for found in re.findall(r'<figure class="chart( wide)?"', part)]
        assert narrow.count(True) % 2 == 0


def test_rows_of_one_colour_differ_in_dash_and_in_marker():
    looks = [style(place) for place in range(19)]
    for place, look in enumerate(looks):
        for other in looks[:place]:
            assert look.colour != other.colour or (look.dash != other.dash and look.marker != other.marker)


def test_several_comparisons_and_runs_in_one_page(comparison, single):
    text = text_of(page(comparison(), comparison(name="second"), single()))
    assert text.count('<article class="study"') == 3
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)


def test_a_comparison_without_any_finished_seed(comparison):
    folder = comparison(("base", "sam"), seeds=1, interrupted=True, verdict=None)
    written = json.loads((folder / "results.json").read_text())
    written["seeds"] = []
    written["rows"] = [{"label": label, "test_accuracy": []} for label in ("base", "sam")]
    (folder / "results.json").write_text(json.dumps(written))
    assert "nothing to compare" in text_of(page(folder))


def test_an_installed_package_has_the_templates():
    """They are named in pyproject.toml and are where the page looks for them."""
    names = {file.name for file in resources.files("flatmin.lab.report").joinpath("page").iterdir()}
    assert {"page.html", "page.css", "page.js"} <= names
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^flatmin = \[.*"lab/report/page/\*"', project, re.MULTILINE)
