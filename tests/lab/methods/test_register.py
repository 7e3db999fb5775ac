"""Methods from outside: what may be registered, and what is the same."""

import functools
import sys
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
def run(monkeypatch):
    """Runs the source of a module as an experiment file is run: a new module in the place of the one before."""

    def run_it(source, name="my_experiment"):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, f"{name}.py", "exec"), vars(module))

    return run_it


def plain(given, settings): ...


def test_what_is_registered_is_found_last():
    card = Card("mine", "what I do", {}, plain)
    register(card)
    assert get_method("mine") is card
    assert list(METHODS)[-1] == "mine"
    register(card)
    assert list(METHODS).count("mine") == 1


def test_a_file_may_be_run_again_and_the_last_one_counts(run):
    run(SOURCE)
    first = METHODS["mine"]
    run(SOURCE)
    assert METHODS["mine"] is not first


def test_a_copy_under_another_name_is_the_same(run):
    run(SOURCE)
    first = METHODS["mine"]
    run(SOURCE, "experiment")  # as in a run's folder
    assert METHODS["mine"] is not first


def test_a_file_that_was_changed_may_be_run_again(run):
    run(SOURCE)
    run(SOURCE.replace("= 0.1", "= 0.2"))
    assert METHODS["mine"].defaults["strength"] == 0.2


@pytest.mark.parametrize(
    ("part", "other"),
    [("= 0.1", "= 0.2"), ("make(2)", "make(3)"), ("int(", "2 * int("), ("what I do", "what else I do")],
)
def test_another_card_of_that_name_is_refused(run, part, other):
    run(SOURCE)
    kept = METHODS["mine"]
    with pytest.raises(InvalidArgumentError, match=r"another method 'mine' already, registered in my_experiment:10; "):
        run(SOURCE.replace(part, other), "your_experiment")
    assert METHODS["mine"] is kept


def test_twice_in_one_file_is_refused(run):
    with pytest.raises(InvalidArgumentError, match="another method 'mine' already, registered in my_experiment:10"):
        run(SOURCE + SOURCE.splitlines()[-1].replace("make(2)", "make(3)"))
    run(SOURCE + SOURCE.splitlines()[-1])


def test_functions_that_were_made_are_compared_by_what_they_hold():
    def make(value, helper):
        return lambda given, settings: (value, helper)

    shared = object()
    register(Card("one", "x", {}, make((1, "a"), shared)))
    register(Card("one", "x", {}, make((1, "a"), shared)))
    for other in (make((2, "a"), shared), make((1, "a"), object())):
        with pytest.raises(InvalidArgumentError, match="another method 'one'"):
            register(Card("one", "x", {}, other))
    register(Card("two", "x", {}, functools.partial(plain, target=1)))
    register(Card("two", "x", {}, functools.partial(plain, target=1)))
    with pytest.raises(InvalidArgumentError, match="another method 'two'"):
        register(Card("two", "x", {}, functools.partial(plain, target=2)))


def test_a_function_that_holds_itself_can_be_compared():
    def make():
        def assemble(given, settings):
            return assemble

        return assemble

    register(Card("mine", "x", {}, make()))
    register(Card("mine", "x", {}, make()))


def test_flatmins_own_and_former_names_are_taken():
    with pytest.raises(InvalidArgumentError, match="another method 'sam' already, flatmin's own"):
        register(Card("sam", "mine", {}, plain))
    with pytest.raises(InvalidArgumentError, match="'squeeze' was the name of logit_squeezing"):
        register(Card("squeeze", "mine", {}, plain))
    own = METHODS["sam"]
    register(own)
    assert METHODS["sam"] is own
    with pytest.raises(InvalidArgumentError, match="flatmin's own"):
        register(Card("sam", "mine", {}, plain))
