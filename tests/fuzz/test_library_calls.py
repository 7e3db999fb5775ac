"""Library calls: a call in order with one or two arguments spoiled is right, or an error of flatmin's in a line."""

import pytest

from tests.fuzz.harness import guarded, report
from tests.library_calls import CALLS, ODD, WRONG

SPOILT = {**WRONG, **ODD}
OF_NETWORKS = "refresh"  # runs the network on what it is given, whose errors are its user's
THEIRS = {  # what a closure, a callback, a data set or a collate function that was given does
    (".step", "a network without parameters"),
    ("on_progress", "a network without parameters"),
    ("IndexedDataset", "a tensor of int8"),
    ("IndexedDataset", "text"),
    ("IndexedDataset", "too large"),
    ("collate.__call__", "an empty list"),
}
# Of files that are changed elsewhere at this time, see tests/contracts/test_wrong_arguments.py.
WAITING = {"normalization_parameters", "SQuAT"}


def spoil(name, draw):
    """A call of the table with one or two arguments spoiled, and how it is shown."""
    function, arguments = CALLS[name]()
    chosen = draw.sample(list(arguments), min(draw.choice((1, 1, 2)), len(arguments)))
    kinds = {argument: draw.choice(list(SPOILT)) for argument in chosen}
    arguments.update({argument: SPOILT[kind]() for argument, kind in kinds.items()})
    return function, arguments, f"{name}: {kinds}"


@pytest.mark.parametrize("part", range(3))
def test_a_spoilt_call_is_right_or_an_error_in_a_line(draw, times, part):
    names = [name for name in CALLS if OF_NETWORKS not in name and name not in WAITING]
    faults = []
    for _ in range(100 * times):
        function, arguments, shown = spoil(draw.choice(names), draw)
        if any(part in shown and kind in shown for part, kind in THEIRS):
            continue
        found, fault = guarded(lambda function=function, arguments=arguments: function(**arguments), seconds=10)
        if not fault and isinstance(found, Exception) and not str(found).strip():
            fault = "says nothing"
        if fault:
            faults.append(f"{shown}: {fault}")
    report(faults)
