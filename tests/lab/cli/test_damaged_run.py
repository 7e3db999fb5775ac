"""Damaged and foreign runs: every command says in one line what is wrong, and runs no code that it was not asked to."""

import itertools
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from flatmin.errors import ExperimentError
from flatmin.lab.runs import measure_landscape, measure_sharpness, open_saved
from flatmin.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from flatmin.lab.runs.train import resume
from tests.lab.cli.conftest import fails_in_one_line
from tests.lab.report.conftest import write_comparison

SHARPNESS = ["sharpness", "run", "--samples", 8, "--eigenvalues", 0]
LANDSCAPE = ["landscape", "run", "--samples", 8, "--points", 2, "--directions", 1]
RESUME = ["train", "--resume", "run"]
REPORT = ["report", "run"]
WRONG = [5, [], {}, None, "x", "y" * 100_000, {"a": [[{"b": [1, None]}]]}]


def places(value, path=()):
    """Where there is something in nested JSON: keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_wrong(value, paths, every=1, start=0):
    """The JSON with each wrong value in turn at each place, and without anything there; or every third of all these."""
    for path, wrong in list(itertools.product(paths, [*WRONG, places]))[start::every]:
        changed = json.loads(json.dumps(value))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if wrong is places:
            del inner[path[-1]]
        else:
            inner[path[-1]] = wrong
        yield changed


def is_right_or_one_line(found):
    if found.code != 0:
        fails_in_one_line(found)
    return found.code


@pytest.fixture
def one_template(monkeypatch):
    """Jinja reads a page's templates once."""
    import jinja2

    made, make = [], jinja2.Environment

    def environment(**options):
        if not made:
            made.append(make(**options))
        return made[0]

    monkeypatch.setattr(jinja2, "Environment", environment)


@pytest.mark.parametrize(("command", "start"), [(RESUME, 0), (SHARPNESS, 1), (LANDSCAPE, 2)])
def test_anything_of_another_type_in_the_configuration_is_one_line(flatmin, begun, command, start):
    """They read it by the same function, so each tries a third."""
    config = json.loads((begun() / "config.json").read_text())
    parts = {name: config[name] for name in ("method", "settings", "seed", "recipe", "experiment_digest")}
    codes = []
    for changed in with_wrong(config, places(parts), 3, start):
        (begun() / "config.json").write_text(json.dumps(changed))
        codes.append(is_right_or_one_line(flatmin(*command)))
    assert len(codes) >= 80
    assert codes.count(2) > 0.8 * len(codes)


def test_a_report_of_it_is_right_or_one_line(flatmin, begun, one_template):
    folder = begun()
    config = json.loads((folder / "config.json").read_text())
    for changed in with_wrong(config, places(config), 3):
        (folder / "config.json").write_text(json.dumps(changed))
        is_right_or_one_line(flatmin(*REPORT))


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_so_is_that_of_a_comparison(flatmin, begun, one_template, tmp_path, name):
    more = {"selection": {"seeds": [1]}, "base": "base", "partial": {"base": {"1": {"test_loss": 1}}}}
    folder = write_comparison(tmp_path, ("base", "saf"), 1, name="run", sharp=False, **more)
    if name == "config.json":
        (folder / "results.json").unlink()
    whole = json.loads((folder / name).read_text())
    for changed in with_wrong(whole, places(whole), 3):
        (folder / name).write_text(json.dumps(changed))
        is_right_or_one_line(flatmin(*REPORT))


class TestAnotherRunsCheckpoint:
    @pytest.mark.parametrize("command", [RESUME, SHARPNESS, LANDSCAPE], ids=lambda command: command[0])
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda state: state["run"].update(seed=1), "belongs to another run than config.json: seed was 1 and is 0"),
            (
                lambda state: state["run"]["recipe"].update(epochs=9),
                "another run than config.json: epochs was 9 and is 3",
            ),
            (lambda state: state["run"].update(method="base", settings={}), "method was 'base' and is 'sam'"),
            (lambda state: state.update(epoch=-1), "epoch must be an integer of at least 0, got -1"),
            (lambda state: state.update(epoch=7), "its metrics do not match its epochs"),
            (lambda state: state.pop("run"), "KeyError: 'run'"),
        ],
    )
    def test_it_is_refused(self, flatmin, begun, command, change, said):
        folder = begun()
        state = load_checkpoint(folder / "checkpoints/last")
        change(state)
        save_checkpoint(folder / "checkpoints/last", state)
        fails_in_one_line(flatmin(*command), "run/checkpoints/last: ", said)


EVIL = "open('PWNED', 'w').close()\n"
PYTHON = {
    "resume": resume,
    "open_saved": open_saved,
    "measure_sharpness": lambda run, **given: measure_sharpness(run, samples=8, eigenvalues=0, **given),
    "measure_landscape": lambda run, **given: measure_landscape(run, samples=8, points=2, directions=1, **given),
}


def rename(folder, experiment, *, digest=True):
    """Lets a run name another experiment file, as whoever made the folder can."""
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["experiment"] = str(experiment)
    config["experiment_digest"] = sha256((folder / "experiment.py").read_bytes()).hexdigest()
    if not digest:
        del config["experiment_digest"]
    (folder / "config.json").write_text(json.dumps(config))


def infect(folder):
    """Gives the copy of the experiment file a line that leaves a trace."""
    copy = folder / "experiment.py"
    copy.write_text(EVIL + copy.read_text())


class TestTheExperimentFile:
    @pytest.mark.parametrize("digest", [True, False])
    @pytest.mark.parametrize("command", [RESUME, SHARPNESS, LANDSCAPE], ids=lambda command: command[0])
    @pytest.mark.parametrize("named", ["/nonexistent/e.py", "run/experiment.py", "run/checkpoints/../experiment.py"])
    def test_one_that_came_with_the_folder_is_run_only_if_it_is_trusted(self, flatmin, begun, command, named, digest):
        folder = begun()
        infect(folder)
        rename(folder, named, digest=digest)
        fails_in_one_line(flatmin(*command), "experiment.py came with the run", "--trust-experiment")
        assert not Path("PWNED").exists()
        found = flatmin(*command, "--trust-experiment")
        assert (found.code, Path("PWNED").exists()) == (0, True), found.err

    @pytest.mark.parametrize("call", PYTHON.values(), ids=PYTHON)
    def test_so_it_is_from_python(self, begun, call):
        folder = begun()
        rename(folder, "/nonexistent/e.py")
        with pytest.raises(ExperimentError, match=r"/nonexistent/e.py is not there; .*trust_experiment=True"):
            call(folder)
        call(folder, trust_experiment=True)

    def test_that_of_the_comparison_came_with_it(self, flatmin, begun, tmp_path):
        comparison = write_comparison(tmp_path, ("base",), 1, name="both")
        inner = shutil.copytree(begun(), comparison / "runs" / "sam-seed0")
        (inner / "experiment.py").rename(comparison / "experiment.py")
        shutil.copy(comparison / "experiment.py", inner)
        rename(inner, "both/experiment.py")
        fails_in_one_line(flatmin("train", "--resume", inner), "both/experiment.py came with the run")
        (comparison / "config.json").unlink()  # now both is a folder of the user's, who has a file there
        assert flatmin("train", "--resume", inner).code == 0

    @pytest.mark.parametrize("command", [RESUME, SHARPNESS, LANDSCAPE], ids=lambda command: command[0])
    def test_one_that_has_changed_is_refused_with_both_digests(self, flatmin, begun, command):
        was = sha256(Path("tiny_experiment.py").read_bytes()).hexdigest()[:12] if begun() else ""
        Path("tiny_experiment.py").write_text("# another thought\n" + Path("tiny_experiment.py").read_text())
        now = sha256(Path("tiny_experiment.py").read_bytes()).hexdigest()[:12]
        said = f"tiny_experiment.py has changed since the run began (its digest was {was} and is {now})"
        fails_in_one_line(flatmin(*command), said, "its copy run/experiment.py has not")
        shutil.copy("tiny_experiment.py", "run/experiment.py")  # which hid it before there was a digest
        fails_in_one_line(flatmin(*command), said, "start a new run with it")
        Path("tiny_experiment.py").unlink()
        found = flatmin(*command, "--trust-experiment")
        fails_in_one_line(
            found, f"run/experiment.py has changed since the run began (its digest was {was} and is {now})"
        )

    def test_no_compiled_form_that_lies_beside_it_is_run(self, flatmin, begun):
        import importlib.util
        import py_compile

        folder = begun()
        Path("evil.py").write_text(EVIL)
        for source in (folder / "experiment.py", Path("tiny_experiment.py")):
            cache = Path(importlib.util.cache_from_source(source))
            unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile("evil.py", str(cache), invalidation_mode=unchecked)
        assert flatmin(*SHARPNESS).code == 0
        Path("tiny_experiment.py").unlink()
        assert flatmin(*SHARPNESS, "--trust-experiment").code == 0
        assert not Path("PWNED").exists()

    def test_trust_is_for_a_run_that_is_there(self, flatmin, begun):
        begun()
        fails_in_one_line(
            flatmin("train", "tiny_experiment.py", "--trust-experiment"), "--trust-experiment is for --resume"
        )

    @pytest.mark.parametrize("word", ["train", "compare"])
    def test_a_pipe_or_a_folder_is_none(self, flatmin, tmp_path, word):
        os.mkfifo("pipe.py")
        Path("folder.py").mkdir()
        for name, kind in (("pipe", "pipe"), ("folder", "folder")):
            fails_in_one_line(flatmin(word, f"{name}.py"), f"{name}.py: cannot be read (it is not a file but a {kind})")
