"""What is on disk: names, rows, the verdict, and that what is written is what is read."""

import json
from pathlib import Path

import pytest

from flatmin.errors import DataError
from flatmin.lab.results import (
    ComparisonResult,
    Interval,
    Row,
    judge,
    pareto,
    parse_run_name,
    read_comparison,
    run_name,
    verdict,
)
from flatmin.lab.results.tables import main_table

COMMITTED = Path(__file__).parents[3] / "benchmarks" / "results"


def row(label, difference=0.0, p=0.5, ratio=1.0, accuracy=97.0):
    return Row(
        label,
        label,
        {"rho": 0.05},
        [accuracy, accuracy],
        Interval(accuracy, 0.1),
        Interval(difference, 0.2),
        p / 2,
        p,
        ratio,
        0.01,
        960,
    )


BASE = Row("base", "base", {}, [97.0, 98.0], Interval(97.5, 0.3), Interval(0.0, 0.0), 1.0, None, 1.0, 0.01, 0)


class TestNames:
    @pytest.mark.parametrize("label", ["base", "saf lag=2", "saf lag=2 temperature=3", "saf-seed1 k=-1"])
    def test_a_label_comes_back_from_its_folder(self, label):
        assert parse_run_name(run_name(label, 12), ["other", label]) == (label, 12)

    @pytest.mark.parametrize("name", ["other-seed0", "base", "base-seed", "base-seedx", "base-seed0.new", ".lock"])
    def test_what_is_no_run_of_these_rows(self, name):
        assert parse_run_name(name, ["base"]) is None


class TestJudge:
    @pytest.mark.parametrize(
        ("difference", "p", "seeds", "found"),
        [
            (1.0, 0.049, 5, "better"),
            (-1.0, 0.049, 5, "worse"),
            (1.0, 0.05, 5, "open"),
            (1.0, 0.001, 4, "few"),
        ],
    )
    def test_by_level_sign_and_seeds(self, difference, p, seeds, found):
        assert judge(row("sam", difference, p), seeds) == found

    def test_without_numbers_there_is_no_claim(self):
        assert judge(Row("sam"), 9) == "few"


class TestDiverged:
    ROWS = (BASE, row("sam", 2.0, 0.001), row("saf", 1.0, 0.001))

    def test_a_row_that_diverged_is_neither_better_nor_worse_nor_on_the_line(self):
        lost = self.ROWS[1].with_diverged(1)
        assert judge(lost, 5) == judge(lost, 2) == "diverged"
        assert lost not in pareto([BASE, lost])
        assert self.ROWS[1].with_diverged(0) == self.ROWS[1]

    @pytest.mark.parametrize(("seeds", "cell"), [(1, "diverged (1 of 2 seeds)"), (2, "diverged")])
    def test_its_cell_says_so(self, seeds, cell):
        assert main_table([self.ROWS[1].with_diverged(seeds)])[1][:3] == ["sam", cell, ""]

    @pytest.mark.parametrize("most", [None, 1])
    def test_the_verdict_names_it_and_counts_the_others(self, most):
        text = verdict([BASE, self.ROWS[1].with_diverged(2), self.ROWS[2]], 5, most=most)
        assert "saf (+1.00 points" in text
        assert "Diverged, so without a result: sam (2 of 2 seeds)." in text
        assert "Holm-corrected for 1 comparison;" in text

    def test_with_few_seeds_it_is_named_too(self):
        assert verdict([BASE, self.ROWS[1].with_diverged(1)], 2).endswith(
            "Diverged, so without a result: sam (1 of 2 seeds)."
        )

    def test_a_diverged_base_leaves_nothing_to_compare_with(self):
        assert "It is the base, so there is nothing to compare with." in verdict(
            [BASE.with_diverged(1), self.ROWS[2]], 5
        )

    @pytest.mark.parametrize("label", ["sam", "base"])
    def test_files_from_before_it_was_noticed_are_read_without_what_it_makes_void(self, label):
        metrics = {each.label: {str(seed): {"test_loss": 0.5} for seed in range(2)} for each in self.ROWS}
        metrics[label]["1"]["test_loss"] = None
        rows = [{k: v for k, v in each.to_json().items() if k != "diverged"} for each in self.ROWS]
        written = {"rows": rows, "recipe": {}, "seeds": list(range(5)), "metrics": metrics, "verdict": "old"}
        found = ComparisonResult.from_json(written, "file")
        by_label = {each.label: each for each in found.rows}
        assert (by_label[label].diverged, by_label[label].accuracy) == (1, None)
        assert f"Diverged, so without a result: {label} (1 of 2 seeds)." in found.verdict
        compared = [each.label for each in found.rows[1:] if each.difference is not None]
        assert compared == (["saf"] if label == "sam" else [])
        assert by_label["saf"].accuracy == self.ROWS[2].accuracy
        again = ComparisonResult.from_json(json.loads(json.dumps(found.to_json())), "file")
        assert (again.rows, again.verdict) == (found.rows, found.verdict)


class TestVerdict:
    def test_of_many_rows_it_may_name_only_those_that_one_would_take(self):
        rows = [BASE, *(row(f"m{number}") for number in range(4))]
        rows += [row("good", 2.0, 0.001, 2.0, 99.5), row("cheap", 1.0, 0.001, 1.1, 98.5), row("bad", -1.0, 0.001)]
        text = verdict(rows, 5, most=6)
        assert "2 of 7 methods are better than base beyond noise here, 1 is worse, and 4 not told apart." in text
        assert "The most accurate of them: good (+2.00 points at 2.00 times the step)." in text
        assert "The cheapest of them: cheap (+1.00 points at 1.10 times the step)." in text
        assert "no other is at once as cheap and as accurate as base, cheap and good." in text
        assert "Holm-corrected for 7 comparisons" in text
        assert "m3 (+0.00 points at 1.00 times the step)" in verdict(rows, 5)

    def test_every_committed_verdict_is_what_the_rows_say(self):
        checked = 0
        for path in sorted(COMMITTED.glob("*.json")):
            written = json.loads(path.read_text())
            if isinstance(written, dict) and "verdict" in written and written.get("rows"):
                found = read_comparison(path)
                assert verdict(found.rows, len(found.seeds)) == written["verdict"], path
                checked += 1
        assert checked > 3


class TestOnDisk:
    def make(self, **changed):
        metrics = {label: {0: {"test_accuracy": 0.97}, 1: {"test_accuracy": 0.98}} for label in ("base", "sam")}
        rows = [BASE, row("sam", 1.0, 0.01)]
        values = {
            "recipe": {"data": "digits", "model": "cnn", "epochs": 3},
            "metrics": metrics,
            "partial": {"base": {2: {"test_accuracy": 0.5}}},
            "plain_step_ratio": {"sam": 1.1},
            "selection": {"held_out": 0.2},
            "interrupted": True,
        }
        return ComparisonResult(rows, [0, 1], verdict(rows, 2), **{**values, **changed})

    def test_what_is_written_is_what_is_read(self, tmp_path):
        result = self.make()
        (tmp_path / "results.json").write_text(json.dumps(result.to_json()))
        assert read_comparison(tmp_path).to_json() == result.to_json()
        assert read_comparison(tmp_path).rows == result.rows
        assert read_comparison(tmp_path).folder == tmp_path
        assert read_comparison(tmp_path / "results.json").metrics == result.metrics

    def test_the_base_has_no_corrected_p_value_and_a_row_without_runs_has_no_interval(self):
        written = self.make().to_json()
        assert "p_value_holm" not in written["rows"][0]
        assert not {"accuracy", "difference", "p_value"} & Row("sam").to_json().keys()

    def test_it_prints_as_a_table_with_the_verdict(self):
        lines = str(self.make()).splitlines()
        assert lines[0] == "digits, cnn: 2 seeds, 3 epochs, 95 % confidence intervals"
        assert lines[1].split("  ")[0] == "method"
        assert lines[2].split() == ["base", "97.50", "±", "0.30", "1.00x", "0", "B"]
        assert lines[3].split() == ["sam", "97.00", "±", "0.10", "+1.00", "±", "0.20", "1.00x", "960", "B"]
        assert lines[4] == "2 finished seeds: too few for a claim, which takes 5."
        assert len({len(line) for line in lines[1:4]}) == 1

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ("[]", "holds no JSON object"),
            ('{"rows": []}', "not a comparison of flatmin"),
            ('{"rows": [{"label": "a"}, {"label": "a"}], "recipe": {}}', "two rows have the same label"),
        ],
    )
    def test_what_is_no_comparison(self, tmp_path, values, message):
        (tmp_path / "results.json").write_text(values)
        with pytest.raises(DataError, match=message):
            read_comparison(tmp_path)
        with pytest.raises(DataError, match="cannot be read"):
            read_comparison(tmp_path / "nowhere.json")
