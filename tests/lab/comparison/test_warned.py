"""What is warned of in the runs of a comparison is said once, by the process that compares."""

import warnings

import pytest

from flatmin.errors import FlatminWarning, NonFiniteGradientWarning
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.comparison.warned import Warned, sent
from flatmin.lab.recipe import Recipe


@pytest.mark.parametrize("timed", [True, False])
def test_a_warning_of_each_run_is_given_once(timed, tmp_path, forked_workers):
    rows = make_rows(["base", "msam"], {}, epochs=1)
    recipe = Recipe(epochs=1, train_samples=192, device="cpu", fresh_statistics=True)
    made = Comparison(recipe, rows, tmp_path, seeds=2, jobs=2, timed=timed, minutes=0.001)
    with pytest.warns(FlatminWarning) as caught:
        made.run()
    (said,) = [str(each.message) for each in caught if "moves the weights" in str(each.message)]
    assert said.startswith("MSAM's rho=3" if timed else "msam-seed")  # the process that compares has timed the steps
    assert set(made.outcome.metrics["msam"]) == {0, 1}


def test_what_is_sent_and_what_is_shown():
    found = []
    with warnings.catch_warnings(record=True) as caught, sent(found.append):
        warnings.simplefilter("always")
        warnings.warn("ours", NonFiniteGradientWarning, stacklevel=1)
        warnings.warn("other", UserWarning, stacklevel=1)
    assert found == [("ours", NonFiniteGradientWarning)]
    assert [str(each.message) for each in caught] == ["other"]


def test_a_class_of_the_users_is_sent_as_the_one_that_it_is_derived_from():
    class Own(NonFiniteGradientWarning):
        """Which no other process knows."""

    found = []
    with sent(found.append):
        warnings.warn("theirs", Own, stacklevel=1)
    assert found == [("theirs", NonFiniteGradientWarning)]


def test_a_class_is_kept_and_another_text_is_said():
    warned = Warned()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("a", "b", "a"):
            warned.pass_on("sam-seed1", (text, NonFiniteGradientWarning))
    assert [str(each.message) for each in caught] == ["sam-seed1: a", "sam-seed1: b"]
    assert {each.category for each in caught} == {NonFiniteGradientWarning}


def test_other_numbers_of_another_seed_are_not_said_but_those_of_another_row_are():
    warned = Warned()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with warned.listening():
            warnings.warn("took 3 s", FlatminWarning, stacklevel=1)
        for run, text in (("a-seed0", "by 9.5%"), ("a-seed1", "by 10%"), ("a-seed2", "by 12%"), ("b-seed0", "by 13%")):
            warned.pass_on(run, (text, FlatminWarning))
            warned.pass_on(run, ("took 4 s", FlatminWarning))
    assert [str(each.message) for each in caught] == ["took 3 s", "a-seed0: by 9.5%", "b-seed0: by 13%"]
