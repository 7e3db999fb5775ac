"""Damaged runs: files of a real run that are cut, mixed up, of another type, of another run, gone, or no files at all.

Whatever reads a run is called on each: it comes out right, or says in one line what is wrong, and nothing else of the
folder has changed then.
"""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from flatmin import lab
from tests.fuzz.harness import command, report
from tests.fuzz.test_experiment_files import write

CASES = 180
WORDS = {
    "report": ("report", "run"),
    "sharpness": ("sharpness", "run", "--samples", 8, "--eigenvalues", 0),
    "landscape": ("landscape", "run", "--samples", 8, "--points", 2, "--directions", 1),
    "resume": ("train", "--resume", "run"),
}
TYPES = (None, 5, -1, 1e400, "x", "y" * 10_000, [], {}, [[]], {"a": [None]}, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of one experiment, of one epoch of two, and where they are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("made")
        patch.chdir(folder)
        experiment = os.path.abspath(write("made", {}))
        for name, seed in (("run", 0), ("other", 1)):
            recipe = lab.Recipe(experiment=experiment, epochs=2, batch_size=16, device="cpu")
            lab.train(recipe, method="mesa", settings={"start_epoch": 0}, seed=seed, out=name)
            _cut_short(Path(name))
        return folder.resolve()


def _cut_short(run):
    """As after a kill in the second epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f"{lines[0]}\n")


def files(run):
    return sorted(path for path in run.rglob("*") if path.is_file())


def cut(path, draw, _):
    path.write_bytes(path.read_bytes()[: draw.randrange(max(1, path.stat().st_size))])


def flipped(path, draw, _):
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 3, 50))):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def other_text(path, draw, _):
    path.write_bytes(draw.choice((b"", b"\0" * 64, b"{", b"null", b"[]\n", b"\xff\xfe", b"NaN", b'{"a": ' * 5000)))


def other_type(path, draw, _):
    """Of a value somewhere in its JSON."""
    if path.suffix not in (".json", ".jsonl"):
        return other_text(path, draw, _)
    first, *rest = path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    value = json.loads(first)
    inner = value
    while isinstance(inner, dict) and inner:
        key = draw.choice(sorted(inner))
        if not (isinstance(inner[key], dict) and inner[key]) or draw.random() < 0.3:
            inner[key] = draw.choice(TYPES)
            break
        inner = inner[key]
    return path.write_text(json.dumps(value) + ("\n" if path.suffix == ".jsonl" else "") + "".join(rest))


def gone(path, *_):
    path.unlink()


def folder(path, *_):
    path.unlink()
    path.mkdir()


def link(path, draw, _):
    path.rename(path.with_name("aside"))
    path.symlink_to(draw.choice((path.with_name("aside"), path, "/etc/passwd", "/dev/zero", "nowhere")))


def pipe(path, *_):
    path.unlink()
    os.mkfifo(path)


def of_another_run(path, _, run):
    shutil.copy(run.parent / "other" / path.relative_to(run), path)


def of_another_kind(path, draw, run):
    shutil.copy(draw.choice([each for each in files(run) if each != path]), path)


DAMAGES = (cut, flipped, other_text, other_type, other_type, gone, folder, link, pipe, of_another_run, of_another_kind)


def kept(run):
    """What there is beside what was damaged."""
    return {path: sha256(path.read_bytes()).hexdigest() for path in files(run) if not path.is_symlink()}


def test_every_word_says_it_in_one_line(made, times, draw, tmp_path):
    faults, codes = [], []
    for number in range(CASES * times):
        place = tmp_path / str(number)
        shutil.copytree(made, place)
        os.chdir(place)
        run = place / "run"
        damage, path = draw.choice(DAMAGES), draw.choice(files(run))
        damage(path, draw, run)
        before = kept(run)
        word = draw.choice(sorted(WORDS))
        came = command(*WORDS[word])
        what = f"{number}: {word} after {damage.__name__} of {path.relative_to(place)}: "
        if fault := came.fault(wrong=None):
            faults.append(what + fault)
        codes.append(came.code)
        if came.code == 2:
            after = kept(run)
            faults += [f"{what}has changed {each}" for each in before if after.get(each) != before[each]]
        os.chdir(tmp_path)
        shutil.rmtree(place)
    report(faults)
    assert codes.count(2) > len(codes) / 4
    assert codes.count(0) > len(codes) / 10


def test_a_checkpoint_of_another_run_is_refused_by_whatever_reads_it(made, tmp_path):
    shutil.copytree(made, tmp_path / "all")
    os.chdir(tmp_path / "all")
    shutil.rmtree("run/checkpoints")
    shutil.copytree("other/checkpoints", "run/checkpoints")
    report(
        [command(*WORDS[word]).fault(wrong=True, said="another run") for word in ("sharpness", "landscape", "resume")]
    )
