"""A folder that may be anybody's: links, pipes and folders at every name that the command writes or reads in it."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.cli.conftest import fails_in_one_line
from tests.lab.report.conftest import write_comparison

PRECIOUS = "nobody may touch this"
FAST = ["--samples", "8"]
WORDS = {
    "resume": ["train", "--resume", "run"],
    "sharpness": ["sharpness", "run", "--eigenvalues", "0", *FAST],
    "landscape": ["landscape", "run", "--points", "2", "--directions", "1", *FAST],
    "after": ["after", "run"],
    "report": ["report", "run"],
    "report of a comparison": ["report", "run"],
}

FOLDERS = [f"checkpoints/{name}" for name in ("last", "previous", "best")]
BESIDE = [f"{folder}.{suffix}" for folder in FOLDERS for suffix in ("new", "old")]
INNER = [f"{folder}/{file}" for folder in FOLDERS for file in ("state.json", "tensors.safetensors")]
# What each word reads, which is refused, and what it replaces or removes, whatever it is.
READS = {
    "resume": [".lock", "config.json", "experiment.py", "checkpoints", *FOLDERS, *INNER[:2]],
    "sharpness": ["config.json", "experiment.py", "checkpoints", "checkpoints/last", *INNER[:2]],
    "landscape": ["config.json", "experiment.py", "checkpoints", "checkpoints/last", *INNER[:2], "landscape.partial"],
    "after": [],  # as sharpness
    "report": ["config.json", "metrics.jsonl", "sharpness.json", "landscape.json", "landscape-2.json", "report.html"],
    "report of a comparison": [
        *("config.json", "results.json", "runs", "runs/base-seed0", "report.html"),
        *(f"runs/base-seed0/{name}" for name in ("metrics.jsonl", "sharpness.json", "landscape.json")),
    ],
}
REPLACES = {
    "resume": ["metrics.jsonl", "metrics.jsonl.new", *BESIDE, *INNER[2:]],
    "sharpness": ["sharpness.json", "sharpness.json.new"],
    "landscape": ["landscape.json", "landscape.json.new", "landscape.partial.new"],
    "after": ["after.json", "after.json.new"],
    "report": ["report.html.new"],
    "report of a comparison": ["report.html.new"],
}
KINDS = ["link to a file", "link to a folder", "link to zeros", "link to nothing", "circle", "pipe", "folder"]


def plant(path, kind, outside):
    """Puts something else in the place of ``path``."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    targets = {"link to a file": outside / "file", "link to a folder": outside, "link to zeros": Path("/dev/zero")}
    targets |= {"link to nothing": outside / "nothing", "circle": path}
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def at_most(seconds):
    """Ends what hangs."""

    def hang(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(begun, tmp_path):
    """Gives a new folder ``run`` for a word, and a folder outside of it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text(PRECIOUS)

    def make(word):
        if word != "report of a comparison":
            return begun(), outside
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return write_comparison(tmp_path, ("base", "saf"), 1, name="run"), outside

    return make


@pytest.mark.parametrize(("word", "name"), [(word, name) for word in WORDS for name in READS[word]])
def test_what_is_read_is_refused_by_name_unless_it_is_a_file_of_its_own(flatmin, place, word, name):
    for kind in KINDS:
        if kind == "folder" and name in READS[word] and "." not in name.rpartition("/")[2]:
            continue  # an empty folder in the place of a folder
        folder, outside = place(word)
        plant(folder / name, kind, outside)
        with at_most(60):
            found = flatmin(*WORDS[word])
        said = {"folder": "folder", "pipe": "pipe"}.get(kind, "symbolic link")
        fails_in_one_line(found, "run", name.rpartition("/")[2], said)
        assert content(outside) == {Path("file"): PRECIOUS.encode()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
def test_what_is_written_takes_the_place_of_a_link_or_pipe_and_follows_none(flatmin, place, word, kind):
    """All names at once, but for a folder in the place of a file, which is not removed."""
    folder, outside = place(word)
    names = [name for name in REPLACES[word] if kind != "folder" or name.startswith("checkpoints/")]
    for name in names:
        plant(folder / name, kind, outside)
    with at_most(60):
        found = flatmin(*WORDS[word])
    assert (found.code, found.err.count("flatmin:")) == (0, 0), found.err
    assert content(outside) == {Path("file"): PRECIOUS.encode()}
    assert all(path.is_dir() or path.is_file() for path in folder.rglob("*"))
    assert not any(path.is_symlink() or path.name.endswith((".new", ".old")) for path in folder.rglob("*"))
    if word == "resume":
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


FILES = [(word, name) for word in WORDS for name in REPLACES[word] if not name.startswith("checkpoints/")]


@pytest.mark.parametrize(("word", "name"), FILES)
def test_a_folder_in_the_place_of_a_file_that_is_written_stays(flatmin, place, word, name):
    folder, outside = place(word)
    plant(folder / name, "folder", outside)
    (folder / name / "file").write_text(PRECIOUS)
    fails_in_one_line(flatmin(*WORDS[word]), f"run/{name.removesuffix('.new')}", "s a directory")
    assert (folder / name / "file").read_text() == PRECIOUS


@pytest.mark.parametrize("suffix", ["new", "old"])
def test_a_link_does_not_become_the_checkpoint_that_is_missing(flatmin, place, suffix):
    folder, outside = place("resume")
    elsewhere = (folder / "checkpoints/last").rename(outside / "last")
    (folder / f"checkpoints/last.{suffix}").symlink_to(elsewhere)
    before = content(outside)
    fails_in_one_line(flatmin(*WORDS["resume"]), f"run/checkpoints/last.{suffix}", "symbolic link")
    assert content(outside) == before


@pytest.mark.parametrize("word", WORDS)
def test_a_link_that_the_user_names_is_followed(flatmin, place, word):
    folder, _ = place(word)
    folder.rename("elsewhere")
    folder.symlink_to("elsewhere")
    found = flatmin(*WORDS[word])
    assert found.code == 0, found.err


def test_so_is_a_results_file_and_a_new_folder(flatmin, place, experiment):
    folder, _ = place("report of a comparison")
    Path("results").symlink_to(folder / "results.json")
    Path("out").symlink_to("empty")
    Path("empty").mkdir()
    found = flatmin("report", "results", "--out", "page.html")
    assert found.code == 0, found.err
    assert flatmin("train", experiment(), "--method", "base", "--epochs", 1, "--out", "out").code == 0
    assert (Path("empty") / "config.json").is_file()


@pytest.mark.parametrize(("word", "name"), [("report", "config.json"), ("resume", "config.json")])
def test_what_is_too_large_is_not_read(flatmin, place, word, name):
    folder, _ = place(word)
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room
    fails_in_one_line(flatmin(*WORDS[word]), f"run/{name}: cannot be read (it has 1099511627776 bytes", "16777216)")


@pytest.mark.parametrize("word", ["resume", "sharpness", "landscape"])
def test_a_checkpoint_that_is_named_is_not_reached_through_a_link_in_the_folder(flatmin, place, word):
    folder, outside = place(word)
    (folder / "checkpoints").rename(outside / "checkpoints")
    (folder / "checkpoints").symlink_to(outside / "checkpoints")
    before = content(outside)
    words = [argument.replace("run", "run/checkpoints/best") for argument in WORDS[word]]
    fails_in_one_line(flatmin(*words), "run/checkpoints: ", "symbolic link")
    assert content(outside) == before
