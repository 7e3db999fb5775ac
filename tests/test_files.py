"""Files on disk: JSON that is strict, written whole, and no link, pipe or device in their place."""

import json
import math
import os

import pytest

from flatmin._files import (
    append_line,
    copy_file,
    locked,
    plain,
    read_bytes,
    remove,
    write_json,
    write_lines,
    write_new,
    write_whole,
)
from flatmin.errors import DataError, OutputError


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


@pytest.fixture
def precious(tmp_path):
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "precious"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"
    assert [each.name for each in path.parent.iterdir()] == ["precious"]


@pytest.fixture
def planted(tmp_path, precious):
    """Makes something else than a file and returns its path and what it is called."""

    def make(kind):
        path = tmp_path / "planted"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path = tmp_path.__class__("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"link": precious, "dangling": precious.with_name("nothing"), "circle": path}[kind])
        return path, {"pipe": "a pipe", "device": "a device", "folder": "a folder"}.get(kind, "a symbolic link")

    return make


LINKS = ["link", "dangling", "circle"]
KINDS = [*LINKS, "pipe", "folder", "device"]
WRITERS = {
    "write_whole": lambda path: write_whole(path, b"{}"),
    "write_json": lambda path: write_json(path, {}),
    "write_lines": lambda path: write_lines(path, [{}]),
}


class TestWhatIsNoFile:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_neither_read_nor_added_to_nor_a_lock(self, planted, kind):
        path, called = planted(kind)
        with pytest.raises(DataError, match=f"{path}: cannot be read .it is not a file but {called}"):
            read_bytes(path)
        with pytest.raises(OutputError, match=f"{path}: cannot be written: .*it is not a file but {called}"):
            append_line(path, {})
        if kind != "device":
            with (
                pytest.raises(OutputError, match=rf"cannot be written \(.lock: it is not a file but {called}"),
                locked(path.rename(path.with_name(".lock")).parent),
            ):
                pass

    @pytest.mark.parametrize("kind", [*LINKS, "pipe"])
    @pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
    @pytest.mark.parametrize("suffix", ["", ".new"])
    def test_it_is_replaced_by_what_is_written(self, tmp_path, planted, kind, write, suffix):
        path, _ = planted(kind)
        path.rename(tmp_path / f"a.json{suffix}")
        write(tmp_path / "a.json")
        assert (tmp_path / "a.json").read_text().strip() == "{}"
        assert not (tmp_path / "a.json").is_symlink()
        assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "outside"]

    @pytest.mark.parametrize("kind", [*LINKS, "pipe"])
    def test_it_is_neither_copied_nor_copied_to(self, tmp_path, planted, kind):
        path, called = planted(kind)
        with pytest.raises(OSError, match=called):
            copy_file(path, tmp_path / "copy")
        (tmp_path / "source").write_text("content")
        copy_file(tmp_path / "source", path)
        assert (path.read_text(), path.is_symlink()) == ("content", False)

    def test_a_link_that_may_be_followed(self, planted):
        path, _ = planted("link")
        assert read_bytes(path, follow=True) == b"mine"
        path.unlink()
        path, _ = planted("circle")
        with pytest.raises(DataError, match="planted: cannot be read"):
            read_bytes(path, follow=True)
        with pytest.raises(DataError, match="it is not a file but a device"):
            read_bytes(planted("device")[0], follow=True)

    @pytest.mark.parametrize("kind", [*LINKS, "pipe", "folder"])
    def test_it_is_removed_and_not_what_it_leads_to(self, planted, kind):
        path, _ = planted(kind)
        remove(path)
        assert not os.path.lexists(path)
        remove(path)

    def test_one_that_takes_the_place_of_a_file_while_it_is_opened(self, tmp_path, planted, monkeypatch):
        path, _ = planted("link")
        seen = os.lstat(tmp_path / "outside" / "precious")
        monkeypatch.setattr(os, "lstat", lambda _: seen)  # a moment ago
        with pytest.raises(DataError, match="cannot be read"):
            read_bytes(path)


def test_no_more_is_read_than_is_asked_for(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    assert len(read_bytes(tmp_path / "a", most=11)) == 11
    with pytest.raises(DataError, match="it has 11 bytes, and no such file of flatmin has more than 10"):
        read_bytes(tmp_path / "a", most=10)


def test_of_two_that_write_one_file_at_once_none_leaves_a_part(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: write_new(tmp_path / "a.new", b"a part of the other's"))
    with pytest.raises(OutputError, match="another process is writing it"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
