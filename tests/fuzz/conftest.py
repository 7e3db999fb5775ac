"""The size of the fuzz suite, and an empty folder and the known methods for each of its tests."""

import random

import pytest

from tests.registry import restored


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with restored():
        yield


@pytest.fixture
def times(request):
    """How many times as many random cases to draw."""
    return request.config.getoption("fuzz")


@pytest.fixture
def draw(request):
    """A generator of its own for each test, the same in each run."""
    return random.Random(request.node.name)
