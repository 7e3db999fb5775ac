"""The size of the fuzz suite, and an empty folder for each of its tests."""

import random

import pytest


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def times(request):
    """How many times as many random cases to draw."""
    return request.config.getoption("fuzz")


@pytest.fixture
def draw(request):
    """A generator of its own for each test, the same in each run."""
    return random.Random(request.node.name)
