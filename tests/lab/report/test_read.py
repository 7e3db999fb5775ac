"""From files to what a report knows, and the one line that says what is wrong with them."""

import json

import pytest

from flatmin.errors import DataError, InvalidArgumentError, OutputError
from flatmin.lab.report import write_report
from flatmin.lab.report._read import read_studies
from flatmin.lab.results import verdict


def read(*sources):
    return read_studies(sources)


def test_a_comparison_comes_with_its_rows_runs_and_verdict(comparison):
    (study,) = read(comparison())
    assert [row.label for row in study.rows] == ["base", "sam", "saf"]
    assert [run.seed for run in study.of(study.rows[2])] == [0, 1, 2, 3, 4]
    assert study.rows[1].difference.mean == pytest.approx(0.2)
    assert study.verdict.startswith("Better than base")
    assert study.notes == []
    assert study.title == "digits, cnn"


def test_a_results_file_alone_is_enough(comparison):
    folder = comparison()
    alone = (folder / "results.json").rename(folder.parent / "alone.json")
    (study,) = read(alone)
    assert (len(study.rows), study.runs, study.name) == (3, [], "alone")


def test_without_a_verdict_the_numbers_speak(comparison):
    (study,) = read(comparison(verdict=None))
    assert study.verdict == verdict(study.rows, 5)
    assert "beyond noise here: sam (+0.20 points at 1.50 times the step)." in study.verdict
    assert "Not told apart from it: saf (+0.40 points at 2.00 times the step)." in study.verdict


def test_few_seeds_make_no_claim(comparison):
    (study,) = read(comparison(seeds=2, verdict=None))
    assert study.verdict == "2 finished seeds: too few for a claim, which takes 5."


def test_what_an_interrupted_comparison_has_not_finished_is_left_out_and_said(comparison):
    (study,) = read(comparison(seeds=3, interrupted=True, partial={"base": {"3": {}}, "sam": {}}))
    assert "interrupted" in study.notes[0]
    assert "seed 3" in study.notes[1]


def test_a_comparison_that_was_killed_shows_its_runs(comparison):
    folder = comparison()
    (folder / "results.json").unlink()
    (study,) = read(folder)
    assert "not come to its end" in study.notes[0]
    assert study.rows[0].accuracy.mean == pytest.approx(93)
    assert study.rows[0].accuracy.half is None


def test_single_runs_of_one_recipe_stand_together_and_seeds_in_one_row(single):
    (study,) = read(single("mesa", 0), single("mesa", 1), single("saf", 0))
    assert [(row.label, len(study.of(row))) for row in study.rows] == [("mesa", 2), ("saf", 1)]
    assert not study.compared
    assert "flatmin compare" in study.verdict


def test_a_line_that_is_still_being_written_is_left_out(single):
    folder = single()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tra')
    assert len(read(folder)[0].runs[0].metrics) == 4


def test_numbers_that_are_none_or_not_finite_are_missing(comparison):
    folder = comparison()
    written = json.loads((folder / "results.json").read_text())
    written["rows"][1].update(step_ratio=None, accuracy={"mean": float("nan"), "half": 1e999}, extra_bytes="many")
    (folder / "results.json").write_text(json.dumps(written))
    row = read(folder)[0].rows[1]
    assert (row.step_ratio, row.accuracy, row.extra_bytes) == (None, None, None)
    assert write_report([folder]).exists()


def diverge(folder):
    """Makes the last epoch of a run one with a test loss that is no number."""
    path = folder / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(last), "test_loss": None})]) + "\n")
    return folder


def test_a_run_that_diverged_is_said_to_have(single):
    runs = [diverge(single("mesa", 0)), single("mesa", 1), diverge(single("saf", 0)), single("sam", 0)]
    (study,) = read(*runs)
    assert [row.diverged for row in study.rows] == [1, 1, 0]
    assert "mesa diverged (1 of 2 seeds), saf diverged, sam 9" in study.verdict
    text = write_report(runs).read_text(encoding="utf-8")
    assert "<td>diverged (1 of 2 seeds)</td>" in text
    assert "<td>diverged</td>" in text


def test_a_row_that_diverged_is_shown_without_a_result(comparison):
    folder = comparison()
    written = json.loads((folder / "results.json").read_text())
    for name in ("accuracy", "difference", "p_value_holm"):
        del written["rows"][1][name]
    written["rows"][1]["diverged"] = 2
    (folder / "results.json").write_text(json.dumps({**written, "verdict": None}))
    (study,) = read(folder)
    assert "Diverged, so without a result: sam (2 of 5 seeds)." in study.verdict
    text = write_report([folder]).read_text(encoding="utf-8")
    assert "<td>diverged (2 of 5 seeds)</td>" in text
    assert '<span class="tag worse">diverged</span>' in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "no run of flatmin"),
        ("results.json", '{"rows": [', "is damaged"),
        ("results.json", "[1]", "not a file of flatmin"),
        ("results.json", '{"cases": []}', "not a comparison of flatmin"),
        ("results.json", '{"rows": [{}], "recipe": {}}', "a row has no label"),
        ("results.json", '{"rows": [{"label": "a"}, {"label": "a"}], "recipe": {}}', "two rows have the same label"),
        ("config.json", "", "is damaged"),
        ("config.json", '{"name": "npm"}', "names no method and no recipe"),
        ("config.json", b"\xff\xfe\x00", "it is no text"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_name(tmp_path, name, content, message):
    folder = tmp_path / "foreign"
    folder.mkdir()
    if name is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        write_report([folder])
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_line_is_named(single):
    folder = single()
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: is damaged"):
        read(folder)


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="sources is empty"):
        write_report([])


class TestWhereItIsWritten:
    def test_into_the_folder_and_again(self, comparison):
        folder = comparison()
        assert write_report([folder]) == write_report([folder]) == folder / "report.html"

    def test_beside_a_file(self, comparison):
        folder = comparison()
        alone = (folder / "results.json").rename(folder.parent / "alone.json")
        assert write_report([alone]) == folder.parent / "alone.html"

    def test_never_over_anything_else(self, comparison, tmp_path):
        other = tmp_path / "thesis.html"
        other.write_text("mine")
        with pytest.raises(OutputError, match="was not written by flatmin report"):
            write_report([comparison()], other)
        assert other.read_text() == "mine"

    def test_a_place_that_cannot_be_written(self, comparison, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be"):
            write_report([comparison()], tmp_path / "file" / "page.html")
        with pytest.raises(OutputError, match="is a folder"):
            write_report([comparison(name="other")], tmp_path)
