"""A comparison that was ended: what was trained stays, and the same call goes on with what is missing."""

import json
import os

import pytest

from flatmin import lab
from flatmin._files import locked
from flatmin.errors import DataError, FlatminWarning, OutputError
from flatmin.lab.comparison import job as job_module
from flatmin.lab.comparison import look as look_module
from flatmin.lab.comparison import run as run_module
from flatmin.lab.comparison.outcome import Outcome
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.workers import Stopped
from flatmin.lab.results import Row
from flatmin.lab.results.after import AFTER
from tests.lab.comparison.inline import Inline

MEASURES = 9  # of a run after training, each with a word before it; the fine-tune's two accuracies are one


class Ending(Inline):
    """A job that is stopped never comes to its end, and none begins after it."""

    stopped = False

    def submit(self, name, *arguments):
        if not Ending.stopped:
            super().submit(name, *arguments)
            Ending.stopped = isinstance(self.error, Stopped)

    def wait(self, seconds):
        if Ending.stopped:
            raise KeyboardInterrupt
        return super().wait(seconds)


@pytest.fixture
def compare(tmp_path, monkeypatch, experiment):
    """Compares tiny runs in this process, in a folder with this name; steps are not timed, and there is no page."""
    seconds = iter(range(100))

    def measure(self):
        for row, second in zip(self.outcome.rows, seconds, strict=False):
            self.outcome.step_ratio[row.label] = self.outcome.step_seconds[row.label] = 1.5 + second
        self.outcome.plain_ratio["late_sam"] = 1.25
        self.outcome.extra_bytes = {row.label: 9 for row in self.outcome.rows}

    monkeypatch.setattr(run_module.Comparison, "_measure", measure)
    monkeypatch.setattr(run_module, "Workers", Ending)
    monkeypatch.setattr("flatmin.lab.comparison.compare.write_page", lambda folder: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of runs as small as these

    def call(name, *, epochs=2, recipe=(), **options):
        Ending.stopped = False
        recipe = lab.Recipe(
            **{"experiment": experiment, "epochs": epochs, "batch_size": 16, "device": "cpu", **dict(recipe)}
        )
        options = {"methods": ["base", "late_sam"], "seeds": 1, "jobs": 1, "minutes": 1e-4, **options}
        return lab.compare(recipe, out=tmp_path / name, **options)

    return call


@pytest.fixture
def untrained(monkeypatch):
    """From now on nothing may be trained."""

    def forbid():
        monkeypatch.setattr(job_module, "train_run", pytest.fail)

    return forbid


@pytest.fixture
def measured(monkeypatch):
    """The words on what is measured after training; after so many of ``late_sam`` the measuring is ended."""
    plain, words = job_module.write_after, []

    def write(saved, **options):
        def on_word(word):
            words.append(word)
            if word.startswith("late_sam") and len(words) > words.limit:
                raise Stopped

        return plain(saved, on_word=on_word, **options)

    class Words(list):
        limit = 1000

    words = Words()
    monkeypatch.setattr(job_module, "write_after", write)
    return words


def found_in(result):
    """What does not depend on the machine's speed."""
    return result.seeds, [(row.label, row.test_accuracy, row.after, row.extra_bytes) for row in result.rows]


def test_the_row_stays_wherever_its_measuring_ends_and_then_only_that_is_measured(
    compare, tmp_path, monkeypatch, measured, untrained
):
    whole = found_in(compare("whole", after=True))
    ratios = set()
    for place in range(MEASURES):
        measured[:], measured.limit = [], place + MEASURES * (place == 0)
        with pytest.warns(FlatminWarning, match=r"trained, but not measured .*: late_sam-seed0; the same .* goes on"):
            found = compare("run", after=True)
        written = json.loads((tmp_path / "run/results.json").read_text())
        assert found.interrupted is written["interrupted"] is True
        assert found.seeds == [0]
        assert written["metrics"]["late_sam"]["0"].keys() & AFTER.keys() == set()
        assert (found.rows[0].after.keys(), found.rows[1].after) == (AFTER.keys(), {})
        assert len(found.rows[1].test_accuracy) == 1
        assert len(measured) == measured.limit + 1
        ratios.add(tuple(row.step_ratio for row in found.rows))
        untrained()
        if place % 2:  # as after a crash, when nothing is written: then steps are timed again
            (tmp_path / "run/results.json").unlink()
    measured[:], measured.limit = [], MEASURES
    found = compare("run", after=True)
    assert len(measured) == MEASURES  # there are no more measures than these
    assert all(word.startswith("late_sam") for word in measured)
    ratios.add(tuple(row.step_ratio for row in found.rows))
    assert len(ratios) == 1 + MEASURES // 2
    assert not found.interrupted
    measured[:] = []
    assert found_in(compare("run", after=True)) == found_in(found)
    assert measured == []
    assert found_in(found) == whole


def test_a_run_that_was_ended_is_resumed(compare, tmp_path, monkeypatch):
    whole = compare("whole")
    plain, begun = job_module.train_run, []

    def train(run, folder, *, on_epoch, **options):
        def ending(metrics):
            if run.method == "late_sam":
                raise Stopped
            on_epoch(metrics)

        begun.append(run.method)
        return plain(run, folder, on_epoch=ending, **options)

    monkeypatch.setattr(job_module, "train_run", train)
    found = compare("run")
    assert (found.interrupted, found.seeds, list(found.partial)) == (True, [], ["base"])
    assert len((tmp_path / "run/runs/late_sam-seed0/metrics.jsonl").read_text().splitlines()) == 1
    told = []
    found = compare("run", on_progress=lambda *what: told.append(what))
    assert told[-1] == (4, 4, "1 of 1 seeds done")
    assert begun == ["base", "late_sam"]
    assert found_in(found) == found_in(whole)


@pytest.mark.parametrize(("kind", "name"), [("versions", "torch"), ("hardware", "processor"), (None, None)])
def test_runs_of_another_torch_or_machine_are_said(compare, tmp_path, recwarn, kind, name):
    compare("one")
    path = tmp_path / "one" / "results.json"
    results = json.loads(path.read_text())
    if kind:
        results[kind][name] = "another"
    path.write_text(json.dumps(results))
    recwarn.clear()
    compare("one")
    said = [str(each.message) for each in recwarn if "earlier runs were made with" in str(each.message)]
    assert [f"{name} another, now" in each for each in said] == ([True] if kind else [])


def test_without_a_number_of_seeds_those_that_were_begun_are_done_and_no_more(tmp_path, make_run):
    rows = make_rows(["base", "sam"], {}, epochs=1)
    for name in ("base-seed0", "sam-seed6", "other-seed9", "sam-seed99999999"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_module.Comparison(lab.Recipe(), rows, tmp_path, going_on=True)._begun() == 7


def test_what_is_looked_at_is_kept_and_the_rest_measured_later(compare, tmp_path, monkeypatch):
    plain, seen = {name: getattr(look_module, name) for name in ("write_sharpness", "write_landscape")}, []

    def counted(name):
        def call(saved, *given, **options):
            seen.append((name, saved.name))
            if seen[-1] == ending:
                raise KeyboardInterrupt
            return plain[name](saved, *given, **options)

        return call

    for name in plain:
        monkeypatch.setattr(look_module, name, counted(name))
    results = []
    every = [(name, run) for run in ("base-seed0", "late_sam-seed0") for name in plain]
    for place, ending in enumerate(every):  # noqa: B007 - read by what it ends
        seen.clear()
        with pytest.warns(FlatminWarning, match="the comparison itself is complete, .* goes on with them"):
            results.append(found_in(compare("run", look=2)))
        assert seen == every[max(place - 1, 0) : place + 1]
    seen.clear()
    ending = None
    results.append(found_in(compare("run", look=2)))
    assert seen == every[-1:]
    assert results == results[:1] * 5


class TestAnother:
    """What makes it another comparison is refused, and what changes no run is not."""

    OTHER = (
        ({"epochs": 3}, "epochs was 2 and is 3"),
        ({"recipe": {"lr": 0.3}}, "lr was None and is 0.3"),
        ({"seeds": 2}, "seeds was 1 and is 2"),
        ({"seeds": None}, "seeds was 1 and is None"),
        ({"methods": ["base", "sam"]}, "rows was .*late_sam.* and is .*'sam'"),
        ({"settings": {"base": {"smoothing": 0.1}}}, "rows was .* and is .*smoothing"),
        ({"select": 1, "settings": {"base": {"smoothing": [0.0, 0.1]}}}, "select was None and is 1"),
    )

    def test_all_in_one_folder(self, compare, tmp_path, monkeypatch, experiment, untrained):
        found = compare("run")
        before = (tmp_path / "run/results.json").read_text()
        for options, said in self.OTHER:
            with pytest.raises(OutputError, match=rf"holds another comparison \(.*{said}.*give --out a new folder"):
                compare("run", **options)
        with open(experiment, "a") as file:
            file.write("\n")
        with pytest.raises(OutputError, match=r"another comparison \(digest of the experiment file was"):
            compare("run")
        with open(experiment, "r+") as file:
            file.truncate(len(file.read()) - 1)
        assert (tmp_path / "run/results.json").read_text() == before
        untrained()
        assert found_in(compare("run", minutes=5, jobs=2)) == found_in(found)
        more = compare("run", after=True)
        assert more.rows[1].after.keys() == AFTER.keys()
        results = tmp_path / "run/results.json"
        written = json.loads(results.read_text())
        written["metrics"]["base"]["0"] = {"test_accuracy": "x"}  # damaged: looked up in the run
        written["metrics"]["late_sam"]["0"]["rounded_2"] = None
        results.write_text(json.dumps(written))
        assert found_in(compare("run", after=True)) == found_in(more)
        results.unlink()
        kept = (tmp_path / "run/runs/base-seed0").rename(tmp_path / "outside")
        (tmp_path / "run/runs/base-seed0").symlink_to(kept)
        with pytest.raises(OutputError, match=r"base-seed0: cannot be written \(.*symbolic link"):
            compare("run")
        with locked(tmp_path / "run"), pytest.raises(OutputError, match="another process is writing"):
            compare("run")
        with open(tmp_path / "run/results.json", "w") as file:
            file.write("{")
        with pytest.raises(DataError, match=r"results\.json"):
            compare("run")
        assert (tmp_path / "run/results.json").read_text() == "{"

    def test_settings_that_were_chosen_stay_chosen(self, compare, monkeypatch, untrained):
        options = {"select": 1, "settings": {"base": {"smoothing": [0.0, 0.1]}}, "methods": ["base"]}
        found = compare("run", **options)
        untrained()
        monkeypatch.setattr("flatmin.lab.comparison.compare.select_rows", pytest.fail)
        again = compare("run", **options)
        assert (found_in(again), again.selection) == (found_in(found), found.selection)
        with pytest.raises(OutputError, match=r"rows was .*0\.1.* and is .*0\.2"):
            compare("run", **{**options, "settings": {"base": {"smoothing": [0.0, 0.2]}}})


def test_measures_of_some_seeds_are_of_those_that_every_row_has():
    found = Outcome(lab.Recipe(), [Row(label, label, {}) for label in ("base", "sam")])
    for place, label in enumerate(("base", "sam")):
        found.metrics[label] = {seed: {"test_accuracy": 0.9, "rounded_2": 0.5 + 0.1 * place} for seed in range(6)}
    whole = found.result()
    assert "of 6 seeds" not in str(whole)
    assert [len(row.after["rounded_2"].values) for row in whole.rows] == [6, 6]
    del found.metrics["sam"][5]["rounded_2"], found.metrics["base"][4]["rounded_2"]
    some = found.result()
    assert some.seeds == list(range(6))
    assert [len(row.after["rounded_2"].values) for row in some.rows] == [4, 4]
    assert "After training: test accuracy % of 4 of 6 seeds, in brackets" in str(some)
    assert "too few seeds for a claim" in str(some)
    assert ")*" not in str(some)
