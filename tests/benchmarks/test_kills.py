"""A few kills of each word of the command; ``make stress`` has a hundred."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kills
from flatmin.lab.results import CONFIG

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@linux
@pytest.mark.timeout(900)  # a dozen processes that import torch
def test_one_kill_of_each_word_leaves_nothing_wrong(tmp_path, threads):
    bench = kills.Bench(tmp_path, ["saf"])
    bench.seconds = dict.fromkeys(kills.WORDS, 4.0)  # about; to find it out costs as much again
    drawn = kills.cases(seed=int(os.environ.get("FLATMIN_KILLS_SEED", "7")), methods=["saf"])
    done = kills.kill(bench, len(kills.WORDS), drawn, print)
    assert [(case.word, case.wrong) for case in done if case.wrong] == []
    assert {case.signal for case in done} == set(kills.SIGNALS)


def test_every_word_is_killed_by_every_signal():
    drawn = list(itertools.islice(kills.cases(seed=0), 24))
    assert len({(case.word, case.signal) for case in drawn}) == len(kills.WORDS) * len(kills.SIGNALS) == 24
    assert {case.group for case in drawn} == {True, False}
    assert [vars(case) for case in itertools.islice(kills.cases(seed=0), 24)] == [vars(case) for case in drawn]


def case(word="train", code=2, signal="TERM", line=""):
    return kills.Case(word, signal, False, "saf", 0.5, 0.1, code=code, line=line)


@pytest.mark.parametrize(
    ("code", "error", "right"),
    [
        (2, "flatmin: interrupted: no epoch was done\n", True),
        (2, "timing the steps\n0 of 2 seeds done\nflatmin: interrupted: no epoch was done\n", True),
        (0, "", True),
        (2, "", False),
        (130, "", False),
        (1, "Traceback (most recent call last):\n  KeyboardInterrupt\n", False),
        (2, "flatmin: interrupted: x\nTraceback (most recent call last):\n", False),
        (2, "flatmin: interrupted: x\nflatmin: interrupted: x\n", False),
        (2, "flatmin: no such file\n", False),
        (0, "flatmin: interrupted: x\n", False),
    ],
)
def test_what_it_says_is_wrong_is_noticed(code, error, right):
    found = case(code=code)
    kills._check_words(found, error)
    assert (found.wrong == []) is right


def test_files_that_are_wrong_are_noticed(tmp_path):
    (tmp_path / "tmp").mkdir()
    for name, content in (("a.json", "{"), ("metrics.jsonl", '{"a": 1}\n{"a'), ("report.html", "<html>")):
        (tmp_path / name).write_text(content)
        found = case()
        kills._check_files(found, tmp_path)
        assert len(found.wrong) == 1
        (tmp_path / name).unlink()
    (tmp_path / CONFIG).touch()
    (tmp_path / "b.json.new").touch()
    found = case()
    kills._check_files(found, tmp_path)
    assert found.wrong == []
    kills._check_leftovers(found, tmp_path)
    (tmp_path / "tmp" / "x").touch()
    kills._check_leftovers(found, tmp_path)
    assert len(found.wrong) == 3


def test_the_counts_have_a_row_for_each_word_and_signal():
    done = [case("train"), case("train", code=0), case("report", signal="INT")]
    done[0].hit = done[2].hit = True
    done[2].expect(False, "it")
    rows = {(row["word"], row["signal"]): row for row in kills.counts(done)}
    assert len(rows) == 2 * len(kills.SIGNALS)
    assert (rows["train", "TERM"]["kills"], rows["train", "TERM"]["had_ended_before"]) == (1, 1)
    assert (rows["report", "INT"]["wrong"], rows["report", "KILL"]["kills"]) == (1, 0)


def test_the_result_is_of_this_script_and_nothing_was_wrong():
    import json

    result = json.loads((Path(kills.__file__).parent / "results" / "kills.json").read_text())
    assert result["command"].startswith("python benchmarks/kills.py")
    assert result["kills"] == sum(row["kills"] for row in result["counts"]) >= 100
    assert result["wrong"] == sum(row["wrong"] for row in result["counts"]) == 0
    assert all(row["kills"] for row in result["counts"])
