"""Methods from outside: what may be registered, and what is the same."""

import re
from types import ModuleType

import pytest

from flatmin.errors import InvalidArgumentError
from flatmin.lab.methods import METHODS, Card, get_method, register
from tests.registry import restored

SOURCE = """
from flatmin.lab.methods import Assembled, Card, register
STRENGTH = 0.1

def make(factor):
    def assemble(given, settings):
        return Assembled(given.optimizer, extra_bytes=int(factor * settings["strength"]))
    return assemble

register(Card("mine", "what I do", {"strength": STRENGTH}, make(2)))
"""


@pytest.fixture(autouse=True)
def registry():
    with restored():
        yield


@pytest.fixture
def run(tmp_path):
    """Writes a file and executes it as an experiment file is: in a new module each time."""

    def run_it(source, name="my_experiment"):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        module = ModuleType(name)
        module.__file__ = str(path)
        exec(compile(source, path, "exec"), vars(module))

    return run_it


def plain(given, settings): ...


def test_what_is_registered_is_found_last():
    for _ in range(2):
        card = Card("mine", "what I do", {}, plain)
        register(card)
        assert get_method("mine") is card
    assert list(METHODS)[-1] == "mine"
    assert list(METHODS).count("mine") == 1


def test_a_file_may_be_run_again_and_the_last_one_counts(run):
    run(SOURCE)
    first = METHODS["mine"]
    run(SOURCE)
    assert METHODS["mine"] is not first


def test_a_copy_in_another_place_is_the_same(run):
    run(SOURCE)
    first = METHODS["mine"]
    run(SOURCE, "experiment")  # as in a run's folder
    assert METHODS["mine"] is not first


def test_a_file_that_was_changed_may_be_run_again(run):
    run(SOURCE)
    run("\n" + SOURCE.replace("= 0.1", "= 0.2"))
    assert METHODS["mine"].defaults["strength"] == 0.2


def test_another_file_may_not_take_the_name(run, tmp_path):
    run(SOURCE)
    kept = METHODS["mine"]
    place = re.escape(f"registered in {tmp_path / 'my_experiment.py'}, line 10;")
    with pytest.raises(InvalidArgumentError, match=f"there is a method 'mine' already, {place}"):
        run(SOURCE.replace("= 0.1", "= 0.2"), "your_experiment")
    assert METHODS["mine"] is kept


def test_twice_in_one_file_is_refused(run):
    with pytest.raises(InvalidArgumentError, match=r"there is a method 'mine' already, registered in .*, line 10;"):
        run(SOURCE + SOURCE.splitlines()[-1])


def test_in_an_interactive_session_a_name_may_be_given_again():
    session = {"Card": Card, "register": register, "plain": plain}
    for text in ("register(Card('mine', 'one', {}, plain))", "\n\nregister(Card('mine', 'two', {}, plain))"):
        exec(text, session)
    assert METHODS["mine"].summary == "two"


def test_flatmins_own_and_former_names_are_taken():
    own = METHODS["sam"]
    for card in (Card("sam", "mine", {}, plain), own):
        with pytest.raises(InvalidArgumentError, match="there is a method 'sam' already, flatmin's own"):
            register(card)
    assert METHODS["sam"] is own
    with pytest.raises(InvalidArgumentError, match="'squeeze' was the name of logit_squeezing"):
        register(Card("squeeze", "mine", {}, plain))


def test_what_is_no_card_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"card must be a flatmin.lab.methods.Card, got 'sam'"):
        register("sam")
