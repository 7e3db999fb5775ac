"""JSON on disk: strict, whole, and an error that names the file."""

import json
import math

import pytest

from flatmin._files import append_line, plain, write_json
from flatmin.errors import OutputError


def strict(text):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


NOT_FINITE = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1, 2.5), "e": "nan", "f": None, "g": True}
PLAIN = {"a": None, "b": [None, {"c": None}], "d": [1, 2.5], "e": "nan", "f": None, "g": True}


def test_numbers_that_are_not_finite_become_null():
    assert plain(NOT_FINITE) == PLAIN


def test_json_on_disk_is_strict(tmp_path):
    write_json(tmp_path / "a.json", NOT_FINITE)
    assert strict((tmp_path / "a.json").read_text()) == PLAIN
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_lines_are_added(tmp_path):
    for _ in range(2):
        append_line(tmp_path / "a.jsonl", NOT_FINITE)
    assert [strict(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [PLAIN, PLAIN]


@pytest.mark.parametrize("write", [write_json, append_line])
def test_what_cannot_be_written_is_an_output_error(tmp_path, write):
    with pytest.raises(OutputError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.json", {})
