"""The comparison: its rows, what it claims, what it writes, and when it ends."""

import json
import math
import signal
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from flatmin.errors import DataError, FlatminWarning, InvalidArgumentError
from flatmin.lab.comparison import job as job_module
from flatmin.lab.comparison import run as run_module
from flatmin.lab.comparison.job import Job, train_one
from flatmin.lab.comparison.outcome import Outcome
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.comparison.stats import holm
from flatmin.lab.comparison.timing import Cost, StepTimes
from flatmin.lab.comparison.workers import Stopped
from flatmin.lab.recipe import Recipe
from flatmin.lab.results import ComparisonResult, Row
from flatmin.lab.results.after import AFTER
from flatmin.lab.results.tables import after_table, main_table
from flatmin.lab.training.trainer import Trainer
from tests.lab.comparison.inline import Inline

NOISE = [0.3, -0.2, 0.1, -0.4, 0.2]


def outcome(*, costs=None, **accuracies):
    """An outcome with these accuracies in percent, seed by seed, for each row; ``None`` for a run that is missing."""
    found = Outcome(Recipe(), [Row(label, label, {}) for label in accuracies], step_ratio=costs or {})
    for label, values in accuracies.items():
        found.metrics[label] = {
            seed: {"test_accuracy": value / 100} for seed, value in enumerate(values) if value is not None
        }
    return found


def gains(*differences):
    """Accuracies of a base and of a method that differs from it by so much."""
    base = [97.0 + noise for noise in (NOISE * 4)[: len(differences)]]
    return {"base": base, "saf": [value + difference for value, difference in zip(base, differences, strict=True)]}


def test_the_cost_of_a_row_is_the_mean_over_steps_that_pay_and_others():
    found = Outcome(
        Recipe(),
        make_rows(["base", "late_sam", "esam"], {"esam": {"when": ["every:2"]}}, epochs=5),
        step_ratio={"base": 1.0, "late_sam": 2.0, "esam when=every:2": 2.4},
        plain_ratio={"late_sam": 1.1, "esam when=every:2": 1.2},
    )
    for label, calls in (("base", 1.0), ("late_sam", 1.25), ("esam when=every:2", 2.0)):
        found.metrics[label] = {0: {"test_accuracy": 0.9, "mean_closure_calls": calls}}
    ratios = [row.step_ratio for row in found.result().rows]
    assert ratios == pytest.approx([1.0, 0.25 * 2.0 + 0.75 * 1.1, 0.5 * 2.4 + 0.5 * 1.2])


@pytest.mark.parametrize(("limit", "jobs", "threads"), [(1, 1, 1), (2, 1, 2), (8, 1, 4), (8, 3, 1), (1, 8, 1)])
def test_runs_share_the_cores_and_keep_to_the_limit_of_threads_that_the_process_has(
    tmp_path, monkeypatch, limit, jobs, threads
):
    monkeypatch.setattr(run_module, "_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: limit)
    rows = make_rows(["base"], {}, epochs=1)
    assert Comparison(Recipe(device="cpu"), rows, tmp_path, jobs=jobs).threads == threads


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(
    ("methods", "recipe", "named"),
    [
        (["base", "msam", "ema", "sam"], {}, "msam, ema; these"),
        (["base", "mesa"], {}, None),
        (["base", "msam", "ema"], {"fresh_statistics": True}, None),
        (["base", "msam"], {"model": "cnn-gn"}, None),
    ],
)
def test_rows_that_alone_have_fresh_statistics_are_named(methods, recipe, named, timed, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "Workers", Inline)
    monkeypatch.setattr(Trainer, "train_epoch", None)
    monkeypatch.setattr(Comparison, "_train_all", lambda *_: None)
    monkeypatch.setattr(run_module, "measure_rows", without_times)
    rows = make_rows(methods, {}, epochs=5)
    made = Comparison(Recipe(epochs=5, device="cpu", **recipe), rows, tmp_path, jobs=1, timed=timed)
    said = pytest.warns(FlatminWarning, match=f"which base is not: {named}") if named else warnings.catch_warnings()
    with said:
        made.run()


def without_times(rows, make, *_, **__):
    trainers = [make(row) for row in rows]
    return [Cost(StepTimes([1.0]), None) for _ in rows], trainers


class TestAfter:
    """What was measured after training is compared as accuracy is, corrected for all rows and all measures."""

    def found(self, seeds=5, without=()):
        made = outcome(**{label: [97.0 + noise for noise in NOISE[:seeds]] for label in ("base", "sam", "saf")})
        for place, label in enumerate(made.rows):
            for seed, metrics in made.metrics[label.label].items():
                if label.label not in without:
                    metrics["rounded_2"] = 0.8 + 0.02 * place + 0.001 * place * NOISE[seed]
                    metrics["noise_0.2"] = 0.9 + 0.001 * NOISE[seed] * (1 + place)
        return made.result()

    def test_means_paired_differences_and_one_correction_for_all(self):
        base, sam, saf = self.found().rows
        assert list(sam.after) == ["rounded_2", "noise_0.2"]
        assert (sam.after["rounded_2"].difference.mean, base.after["rounded_2"].mean.mean) == pytest.approx((2, 80))
        assert base.after["rounded_2"].p_value_holm is None
        every = [each for row in (sam, saf) for each in row.after.values()]
        assert sorted(each.p_value_holm for each in every) == sorted(holm([each.p_value for each in every]))
        assert sam.after["rounded_2"].p_value_holm > 2 * sam.after["rounded_2"].p_value > 0
        assert sam.difference.mean == 0
        assert sam.p_value_holm == 1.0

    def test_it_comes_back_from_disk_and_stands_below_the_table(self):
        result = self.found()
        written = json.loads(json.dumps(result.to_json()))
        again = ComparisonResult.from_json(written, "file")
        assert [row.after for row in again.rows] == [row.after for row in result.rows]
        *_, heading, base, sam, saf, caption, _ = str(again).splitlines()
        assert heading.split() == ["after", "training", "2", "bits", "noise", "0.2"]
        assert base.split() == ["base", "80.00", "90.00"]
        assert sam.split()[:3] == ["sam", "82.00", "(+2.00)*"]
        assert "(+0.00)*" not in saf
        assert caption.endswith("* beyond noise at 5 %, Holm-corrected for 4 comparisons.")

    def test_few_seeds_claim_nothing(self):
        text = str(self.found(seeds=2))
        assert ")*" not in text
        assert "difference to base; too few seeds for a claim, which takes 5." in text

    def test_without_the_bases_there_is_no_difference_and_without_its_own_no_cell(self):
        base, sam, _ = self.found(without=("base",)).rows
        assert (base.after, sam.after["rounded_2"].difference) == ({}, None)
        rows = self.found(without=("saf",)).rows
        assert after_table(rows, 5)[3] == ["saf", "-", "-"]

    def test_a_seed_that_diverged_leaves_nothing(self):
        made = self.found()
        metrics = {label: dict(by_seed) for label, by_seed in made.metrics.items()}
        metrics["sam"][0] = {"test_accuracy": 0.1, "test_loss": math.nan}
        lost = Outcome(Recipe(), [Row(label, label, {}) for label in metrics], metrics).result()
        assert [bool(row.after) for row in lost.rows] == [True, False, True]
        metrics["base"] = metrics["sam"]
        lost = Outcome(Recipe(), [Row(label, label, {}) for label in metrics], metrics).result()
        assert (lost.rows[2].after["rounded_2"].difference, lost.rows[2].difference) == (None, None)

    @pytest.mark.filterwarnings("ignore:evaluated with batch-norm statistics made anew")
    def test_every_run_is_measured_and_written(self, run_comparison):
        found, results, folder = run_comparison(("base", "ema"), seeds=2, after=True)
        for row in results["rows"]:
            assert list(row["after"]) == list(AFTER)
            for seed in range(2):
                file = folder / "runs" / f"{row['label']}-seed{seed}" / "after.json"
                measured = json.loads(file.read_text())["test_accuracy"]
                assert measured == {name: found.metrics[row["label"]][seed][name] for name in AFTER}
                assert [100 * each for each in measured.values()] == [
                    row["after"][name]["values"][seed] for name in AFTER
                ]

    def test_inputs_without_a_sign_are_refused_before_anything_is_trained(self, run_comparison, experiment):
        with open(experiment, "a") as file:
            file.write("\n_set0 = _set\ndef _set(seed):\n    d = _set0(seed)\n")
            file.write("    return TensorDataset((9 * d.tensors[0]).long(), d.tensors[1])\n")
            file.write("class Floats(nn.Module):\n    def forward(self, x):\n        return x.float()\n")
            file.write("_model = model\ndef model():\n    return nn.Sequential(Floats(), _model())\n")
        with pytest.raises(InvalidArgumentError, match=r"define shift\(x\) in the experiment file"):
            run_comparison(seeds=1, after=True)


def test_the_most_that_a_seed_spent_of_privacy_stands_in_the_table():
    made = outcome(base=[97.0, 98.0], dpsat=[97.0, 98.0])
    for spent, metrics in zip((1.9, 2.0), made.metrics["base"].values(), strict=True):
        metrics["epsilon"] = spent
    result = made.result()
    again = ComparisonResult.from_json(json.loads(json.dumps(result.to_json())), "file")
    assert [line[-1] for line in main_table(again.rows)] == ["epsilon spent", "2.000", "-"]
    assert [line[-1] for line in main_table(outcome(base=[97.0]).result().rows)] == ["extra memory", "-"]


def verdict_of(found):
    return found.result().verdict


@pytest.fixture
def run_comparison(tmp_path, monkeypatch, experiment):
    """Runs a comparison of tiny runs in this process; returns its outcome and what it wrote."""
    monkeypatch.setattr(run_module, "Workers", Inline)
    folder = tmp_path / "comparison"
    folder.mkdir()

    def run(methods=("base", "saf"), *, epochs=2, settings=None, **options):
        recipe = Recipe(experiment=experiment, epochs=epochs, batch_size=16, device="cpu")
        rows = make_rows(methods, settings or {}, epochs=epochs)
        found = Comparison(recipe, rows, folder, **{"minutes": 1e-4, **options}).run()
        return found, json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail), folder

    return run


class TestRows:
    def test_the_base_comes_first_and_the_others_as_they_come(self):
        assert [row.label for row in make_rows(["mesa", "base", "sam"], {}, epochs=60)] == ["base", "mesa", "sam"]

    def test_every_combination_of_settings_is_a_row_of_its_own(self):
        rows = make_rows(["base", "saf"], {"saf": {"coefficient": [0.3, 0.8], "lag": [1, 2]}}, epochs=60)
        assert [row.label for row in rows] == [
            "base",
            "saf coefficient=0.3 lag=1",
            "saf coefficient=0.3 lag=2",
            "saf coefficient=0.8 lag=1",
            "saf coefficient=0.8 lag=2",
        ]
        assert rows[2].settings == {
            "coefficient": 0.3,
            "temperature": 5.0,
            "lag": 2,
            "start_epoch": 5,
            "history": "dense",
            "mean_momentum": None,
            "smoothing": 0.0,
        }

    def test_the_base_may_have_settings_too(self):
        rows = make_rows(["base"], {"base": {"smoothing": [0.0, 0.2]}}, epochs=60)
        assert [(row.label, row.method) for row in rows] == [
            ("base smoothing=0", "base"),
            ("base smoothing=0.2", "base"),
        ]

    @pytest.mark.parametrize(
        ("methods", "settings", "message"),
        [
            (["saf"], {}, "must include base"),
            ([], {}, "must include base"),
            (["base", "saf", "saf"], {}, "has a name twice.*several values"),
            (["base", "sff"], {}, "unknown method 'sff', did you mean"),
            (["base"], {"saf": {"lag": [1]}}, "setting is given for saf, which is not among"),
            (["base"], {"suf": {"lag": [1]}}, "unknown method 'suf'"),
            (["base", "saf"], {"saf": {"rho": [1]}}, "saf has no hyperparameter 'rho'"),
        ],
    )
    def test_what_cannot_be(self, methods, settings, message):
        with pytest.raises(InvalidArgumentError, match=message):
            make_rows(methods, settings, epochs=60)

    @pytest.mark.parametrize("values", [[0.3, 0.3], [0.9999991, 0.9999992]], ids=["equal", "equal when printed"])
    def test_no_two_rows_have_one_label(self, values):
        try:
            rows = make_rows(["base", "saf"], {"saf": {"coefficient": values}}, epochs=60)
        except InvalidArgumentError:
            return
        assert len({row.label for row in rows}) == 3


class TestVerdict:
    def test_clearly_better_with_its_cost(self):
        text = verdict_of(outcome(**gains(1.0, 1.1, 0.9, 1.2, 0.8), costs={"base": 1.0, "saf": 1.0149}))
        assert text.startswith("Better than base beyond noise here: saf (+1.00 points at 1.01 times the step).")
        assert "Worse" not in text
        assert "Not told apart" not in text

    def test_clearly_worse(self):
        text = verdict_of(outcome(**gains(-1.0, -1.1, -0.9, -1.2, -0.8)))
        assert text.startswith("Better than base beyond noise here: none. Worse: saf (-1.00 points).")

    @pytest.mark.parametrize("differences", [(0.5, -0.6, 0.4, -0.2, 0.3), (0.0,) * 5, (3.0, 0.0, 0.0, 0.0, 0.0)])
    def test_noise_is_not_told_apart(self, differences):
        text = verdict_of(outcome(**gains(*differences)))
        assert "beyond noise here: none. Not told apart from it: saf" in text
        assert "Worse" not in text

    def test_a_large_mean_is_no_evidence(self):
        assert "here: none." in verdict_of(outcome(**gains(20.0, -5.0, 15.0, -8.0, 1.0)))

    def test_the_paired_difference_counts_and_not_the_spread_over_seeds(self):
        base = [90.0, 95.0, 85.0, 99.0, 80.0]
        text = verdict_of(outcome(base=base, saf=[value + 0.1 * number for number, value in enumerate(base, start=3)]))
        assert "here: saf (+0.50 points)" in text

    @pytest.mark.parametrize(
        ("accuracies", "said"),
        [
            ({"base": [97], "saf": [99]}, "1 finished seed: too few for a claim, which takes 5."),
            (
                {"base": [], "saf": []},
                "No seed was finished by every method, so there is nothing to compare.",
            ),
        ],
    )
    def test_too_little_gives_no_claim(self, accuracies, said):
        assert verdict_of(outcome(**accuracies)) == said

    def test_the_base_alone(self):
        assert "nothing to compare" in verdict_of(outcome(base=[9, 9, 9]))

    def test_equal_gains_of_every_one_of_many_seeds_are_better(self):
        assert "here: saf" in verdict_of(outcome(**gains(*[1.0] * 10)))

    def test_equal_gains_of_two_seeds_are_not(self):
        samples = {"base": [170, 168], "saf": [172, 170]}  # right answers out of 179
        text = verdict_of(
            outcome(**{label: [100 * right / 179 for right in rights] for label, rights in samples.items()})
        )
        assert text == "2 finished seeds: too few for a claim, which takes 5."

    def test_many_comparisons_ask_for_more_evidence(self):
        one = gains(0.9, 0.1, 0.5, 0.2, 0.6)
        assert outcome(**one).result().rows[1].p_value == pytest.approx(0.0319, abs=1e-3)
        assert "here: saf" in verdict_of(outcome(**one))
        noise = {f"m{number}": [value + 0.01 * number for value in one["base"][::-1]] for number in range(3)}
        many = outcome(**one, **noise)
        row = many.result().rows[1]
        assert row.p_value_holm == pytest.approx(4 * row.p_value)
        assert "here: none." in verdict_of(many)

    def test_it_says_how_it_was_found(self):
        text = verdict_of(outcome(**gains(*NOISE), sam=[97] * 5))
        assert "Paired over 5 seeds, two-sided t-test at 5 %, Holm-corrected for 2 comparisons" in text
        assert "this data, network and recipe only" in text

    def test_each_method_is_in_one_sentence(self):
        found = gains(1.0, 1.1, 0.9, 1.2, 0.8)
        base = found["base"]
        text = verdict_of(outcome(**found, sam=[value - 2 - 0.01 * value for value in base], mesa=base[::-1]))
        better, worse, rest = text.split(". ")[:3]
        assert ("saf" in better, "sam" in worse, "mesa" in rest) == (True, True, True)
        assert text.count("points") == 3


class TestTable:
    def test_mean_interval_paired_difference_and_cost(self):
        found = outcome(base=[90, 92, 94], saf=[91, 94, 97], costs={"base": 1.0, "saf": 1.5}).result()
        base, saf = found.to_json()["rows"]
        assert base["accuracy"] == pytest.approx({"mean": 92, "half": 4.3027 * 2 / math.sqrt(3)}, rel=1e-4)
        assert saf["accuracy"]["mean"] == pytest.approx(94)
        assert saf["difference"] == pytest.approx({"mean": 2, "half": 4.3027 / math.sqrt(3)}, rel=1e-4)
        assert base["difference"]["mean"] == 0
        assert saf["p_value"] == saf["p_value_holm"] == pytest.approx(0.0742, abs=1e-4)
        assert "p_value_holm" not in base
        assert (saf["step_ratio"], saf["extra_bytes"]) == (1.5, None)

    def test_seeds_that_only_some_rows_have_finished_are_not_used(self):
        found = outcome(base=[90, 92, 50, None], saf=[91, 93, None, 99])
        assert found.seeds == [0, 1]
        assert [row.accuracy.mean for row in found.result().rows] == pytest.approx([91, 92])
        written = found.result().to_json()
        assert written["seeds"] == [0, 1]
        assert written["metrics"]["base"].keys() == {"0", "1"}
        assert written["partial"] == {
            "base": {"2": {"test_accuracy": 0.5}},
            "saf": {"3": {"test_accuracy": 0.99}},
        }

    def test_a_row_without_any_run_leaves_no_seeds(self):
        found = outcome(base=[90, 92], saf=[None, None])
        assert found.seeds == []
        assert "accuracy" not in found.result().to_json()["rows"][0]


class TestComparison:
    def test_it_writes_every_number_and_a_folder_for_each_run(self, run_comparison):
        found, results, folder = run_comparison(("base", "saf", "sam"), settings={"saf": {"lag": [1, 2]}}, seeds=2)
        labels = ["base", "saf lag=1", "saf lag=2", "sam"]
        assert [row["label"] for row in results["rows"]] == labels
        assert results["seeds"] == [0, 1]
        assert (results["base"], results["interrupted"]) == ("base", False)
        assert {"command", "versions", "hardware", "recipe"} <= results.keys()
        for row in results["rows"]:
            for seed in (0, 1):
                run = folder / "runs" / f"{row['label'].replace(' ', '-')}-seed{seed}"
                last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                assert results["metrics"][row["label"]][str(seed)].items() >= last.items()
                assert row["test_accuracy"][seed] == 100 * last["test_accuracy"]
        assert len(list((folder / "runs").iterdir())) == 8
        assert json.loads((folder / "config.json").read_text())["recipe"]["epochs"] == 2
        assert found.extra_bytes == {"base": 0, "saf lag=1": 960, "saf lag=2": 1920, "sam": 4 * (40 + 16 + 27)}

    def test_the_table_is_of_the_last_epoch_and_never_of_the_best(self, run_comparison, monkeypatch):
        coming = iter([0.9, 0.5] * 4)
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (1.0, next(coming)))
        found, results, _ = run_comparison(seeds=2)
        assert found.accuracies("base") == found.accuracies("saf") == [50, 50]
        assert [row["test_accuracy"] for row in results["rows"]] == [[50, 50]] * 2

    def test_the_json_is_strict_when_a_loss_is_not_a_number(self, run_comparison, monkeypatch):
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (math.nan, 0.5))
        _, results, _ = run_comparison(seeds=1)
        assert results["metrics"]["base"]["0"]["test_loss"] is None
        assert results["rows"][0]["diverged"] == 1
        assert "accuracy" not in results["rows"][0]

    def test_a_diverged_row_has_no_result_and_the_others_are_compared(self, run_comparison, monkeypatch):
        def evaluate(trainer):
            method, seed = trainer.run.method, trainer.run.seed
            return math.nan if method == "sam" and seed < 2 else 1.0, 0.5 + 0.01 * seed**2 + 0.1 * (method == "saf") * (
                1 + seed
            )

        monkeypatch.setattr(Trainer, "evaluate", evaluate)
        found, results, folder = run_comparison(("base", "saf", "sam"), seeds=5)
        _, saf, sam = result_rows = found.result(folder).rows
        assert [row.diverged for row in result_rows] == [0, 0, 2]
        assert (sam.accuracy, sam.difference, sam.p_value, sam.p_value_holm) == (None,) * 4
        assert saf.difference.mean == pytest.approx(30)
        assert saf.p_value_holm == saf.p_value  # Holm's correction is for one comparison
        assert results["rows"] == json.loads(json.dumps([row.to_json() for row in result_rows]))
        assert "Better than base beyond noise here: saf" in results["verdict"]
        assert "Diverged, so without a result: sam (2 of 5 seeds)." in results["verdict"]
        assert "for 1 comparison;" in results["verdict"]

    def test_with_a_diverged_base_nothing_is_compared(self, run_comparison, monkeypatch):
        monkeypatch.setattr(
            Trainer,
            "evaluate",
            lambda self: (math.nan if self.run.method == "base" else 1.0, 0.5 + 0.01 * self.run.seed),
        )
        found, results, folder = run_comparison(("base", "saf"), seeds=5)
        base, saf = found.result(folder).rows
        assert (base.diverged, base.accuracy) == (5, None)
        assert saf.accuracy.mean == pytest.approx(52)
        assert (saf.difference, saf.p_value, saf.p_value_holm) == (None,) * 3
        assert results["verdict"].startswith("Diverged, so without a result: base (5 of 5 seeds).")

    def test_steps_are_timed_for_every_row_against_the_base(self, run_comparison, monkeypatch):
        def costs(rows, build, batch, **_):
            times = [compare_times(seconds) for seconds in (0.1, 0.15, 0.21)]
            return [Cost(each) for each in times], [build(row) for row in rows]

        def compare_times(seconds):
            return SimpleNamespace(ratio=lambda base: seconds / 0.1, median=lambda: seconds)

        monkeypatch.setattr(run_module, "measure_rows", costs)
        found, results, _ = run_comparison(("mesa", "base", "sam"), seeds=1)
        assert found.step_ratio == pytest.approx({"base": 1.0, "mesa": 1.5, "sam": 2.1})
        assert [row["step_seconds"] for row in results["rows"]] == [0.1, 0.15, 0.21]

    @pytest.mark.parametrize(("minutes", "seconds", "seeds"), [(3, 10, 8), (3, 100, 5), (1e9, 10, 3)])
    def test_it_takes_as_many_seeds_as_fit_in_the_time_and_five_at_least(
        self, run_comparison, monkeypatch, minutes, seconds, seeds
    ):
        clock = SimpleNamespace(now=0.0)

        def train(run, folder, *, on_epoch, on_step, durable):
            clock.now += seconds
            for _ in range(run.recipe.epochs):
                on_epoch({})
            return {"test_accuracy": 0.5}

        monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(job_module, "train_run", train)
        monkeypatch.setattr(Comparison, "_measure", lambda self: None)
        found, _, _ = run_comparison(minutes=minutes, seeds=3 if minutes == 1e9 else None)
        assert found.seeds == list(range(seeds))
        assert clock.now == 2 * seeds * seconds

    def test_memory_is_given_back_before_each_run(self, run_comparison, monkeypatch):
        done = []
        monkeypatch.setattr(Comparison, "_measure", lambda self: done.append("timed"))
        monkeypatch.setattr(job_module, "train_run", lambda *_, **__: done.append("trained") or {"test_accuracy": 0.5})
        for module in (run_module, job_module):
            monkeypatch.setattr(module, "release", lambda: done.append("released"))
        run_comparison(seeds=1)
        assert done == ["timed", "released", *["released", "trained"] * 2]

    @pytest.mark.parametrize(("after", "finished"), [(0, []), (3, [0]), (4, [0, 1])])
    def test_ctrl_c_keeps_the_runs_that_are_done(self, run_comparison, monkeypatch, after, finished):
        runs = iter(range(after))

        def train(run, folder, **_):
            if next(runs, None) is None:
                raise KeyboardInterrupt
            return {"test_accuracy": 0.5}

        class Late(Inline):
            def submit(self, name, *arguments):
                with suppress(KeyboardInterrupt):  # never done
                    super().submit(name, *arguments)

            def wait(self, seconds):
                raise KeyboardInterrupt

        monkeypatch.setattr(run_module, "Workers", Late)
        monkeypatch.setattr(job_module, "train_run", train)
        found, results, _ = run_comparison(seeds=3)
        assert found.interrupted is results["interrupted"] is True
        assert found.seeds == results["seeds"] == finished
        assert sum(len(seeds) for seeds in found.metrics.values()) == after

    def test_ctrl_c_comes_between_two_waits_and_never_within_one(self, run_comparison, monkeypatch):
        done = []

        class Signalled(Inline):
            def wait(self, seconds):
                signal.raise_signal(signal.SIGINT)
                done.append("waited")
                return super().wait(seconds)

            def stop(self, hurry):
                assert not hurry()
                signal.raise_signal(signal.SIGINT)  # twice at once counts as once
                assert not hurry()
                done.append("stopped")

        monkeypatch.setattr(run_module, "Workers", Signalled)
        found, results, _ = run_comparison(seeds=2)
        assert done == ["waited", "stopped"]
        assert found.interrupted is results["interrupted"] is True
        assert found.seeds == [0, 1]

    def test_progress_is_told(self, run_comparison):
        said = []
        run_comparison(seeds=2, on_progress=lambda *what: said.append(what))
        assert said[0] == (0, 0, "timing the steps")
        assert said[-1] == (8, 8, "2 of 2 seeds done")

    def test_an_error_in_a_run_ends_the_comparison_as_it_is(self, run_comparison, monkeypatch, experiment):
        with open(experiment, "a") as file:
            file.write(
                "\n_good = train_set\ndef train_set():\n    d = _good()\n    d.tensors[1][50] = 9\n    return d\n"
            )
        with pytest.raises(DataError, match="outside the 3 classes: 9"):
            run_comparison(seeds=1)

    def test_a_run_stops_at_its_next_step_when_it_is_told(self, make_run, tmp_path, experiment):
        stop = []

        def check():
            if stop:
                raise Stopped

        with pytest.raises(Stopped):
            job = Job(make_run("base", experiment=experiment, epochs=50), tmp_path / "run")
            train_one(job, stop.append, check, pytest.fail)
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
        with pytest.raises(Stopped):
            job = Job(make_run("base", experiment=experiment), tmp_path / "other")
            train_one(job, stop.append, check, pytest.fail)
        assert not (tmp_path / "other").exists()


def test_a_setting_that_is_a_word_makes_a_row_too():
    rows = make_rows(["base", "saf"], {"saf": {"history": ["int8", "mean"]}}, epochs=9)
    assert [row.label for row in rows] == ["base", "saf history=int8", "saf history=mean"]
