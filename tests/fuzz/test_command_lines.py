"""Command lines: every option of every word with values that cannot be, alone and together.

What a command line begins is cut short once everything is checked: nothing is trained, nothing is measured.
"""

import inspect
import itertools
import os
import re
from types import SimpleNamespace
from typing import get_args

import pytest
from typer.models import OptionInfo

from flatmin import lab
from flatmin.lab.cli._shared import app
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.methods import METHODS
from flatmin.lab.methods.hyperparameters import HYPERPARAMETERS
from flatmin.lab.problems.load import load_problem
from flatmin.lab.results.after import AFTER
from flatmin.lab.training.trainer import Trainer
from tests.fuzz.harness import command, left, report
from tests.fuzz.test_experiment_files import write

LONG, BIG = "x" * 5000, "1" + "0" * 39
NEVER = ("", "-1", "1e400", "nan", "inf", BIG, LONG)  # no number of any option
TEXTS = ("/dev/null/x", "a" * 300 + "/b", "\udcff", "é", "a=b", "-", "--", "../..")
VALUES = (*NEVER, *TEXTS, "0", "0.5", "1", "2", "1e39")
WORDS = {each.callback.__name__: inspect.signature(each.callback).parameters for each in app.registered_commands}
METRICS = {"test_accuracy": 0.5, "test_loss": 1.0, "train_loss": 1.0, "epoch": 0, "mean_closure_calls": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was made, by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        recipe = lab.Recipe(experiment=os.path.abspath(write("made", {})), epochs=1, batch_size=16, device="cpu")
        return lab.train(recipe, method="base", out="run").folder.resolve()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Cuts short what is begun, and returns the name of an experiment file."""

    def train_run(run, folder, **_):
        Trainer(run, load_problem(run.recipe, run.seed))
        return METRICS

    def train_all(comparison, deadline):
        comparison.outcome.metrics = {row.label: {0: METRICS} for row in comparison.outcome.rows}

    def written(*_, **__):
        landscape = SimpleNamespace(loss=(1.0,), origin_loss=1.0)
        return SimpleNamespace(
            name="", method="", epoch=1, loss=1.0, samples=1, measures=(), path="", landscape=landscape
        )

    monkeypatch.setattr("flatmin.lab.runs.train.train_run", train_run)
    monkeypatch.setattr("flatmin.lab.runs.sharpness.write_sharpness", written)
    monkeypatch.setattr("flatmin.lab.runs.landscape.write_landscape", written)
    monkeypatch.setattr("flatmin.lab.runs.after.write_after", lambda *_, **__: dict.fromkeys(AFTER, 0.5))
    monkeypatch.setattr("flatmin.lab.report._write.draw", lambda chart, mark: {})
    monkeypatch.setattr(Comparison, "_measure", Comparison._try)
    monkeypatch.setattr(Comparison, "_train_all", train_all)
    monkeypatch.setattr("flatmin.lab.comparison.compare.look_at", lambda *_, **__: None)
    monkeypatch.setattr("flatmin.lab.comparison.compare.write_page", lambda folder: None)
    return write("tiny", {})


def start(word, run, option=""):
    """A command line that is in order, to which ``option`` can be added."""
    name = option.removeprefix("--").replace("-", "_")
    if word in ("after", "sharpness", "landscape", "report"):
        return [word, run]
    named = name in ("data", "model", "crop", "flip", "image_size", "train_samples", "label_noise", "validation")
    line = [word, *([] if named else ["tiny_experiment.py"]), "--epochs", 1, "--batch-size", 16, "--device", "cpu"]
    if word == "compare":
        return [*line, "--methods", "base,saf", "--seeds", 1, "--jobs", 1]
    has = [card.name for card in METHODS.values() if name in card.hyperparameters]
    return [*line, "--method", has[0] if name in HYPERPARAMETERS else "base"]


def options(word):
    """The options of a word that take a value, and whether it is a number."""
    for name, parameter in WORDS[word].items():
        kind, *rest = get_args(parameter.annotation) or [None]
        if kind is not bool and rest and isinstance(rest[-1], OptionInfo):
            declared = rest[-1].param_decls or [f"--{name.replace('_', '-')}"]
            yield declared[0], bool({int, float} & {kind, *get_args(kind)})


def test_every_word_is_known_here():
    assert set(WORDS) == {"train", "compare", "after", "sharpness", "landscape", "report"}
    assert sum(number for word in WORDS for _, number in options(word)) >= 60


@pytest.mark.parametrize("word", WORDS)
def test_a_line_in_order_is_taken(word, run):
    report([command(*start(word, run)).fault(wrong=False)])


def test_no_option_takes_a_number_that_cannot_be(run, draw, times):
    """Before anything is begun: nothing else is printed, no folder is made."""
    every = [(word, *each) for word in WORDS for each in itertools.product(options(word), NEVER)]
    numbers = [(word, name, value) for word, (name, is_number), value in every if is_number]
    faults, before = [], left()
    for word, name, value in draw.sample(numbers, min(110 * times, len(numbers))):
        came = command(*start(word, run, name), f"{name}={value}")
        faults.append(came.fault(wrong=True, only=True))
    report(faults)
    assert left() == before


def test_any_value_of_any_option_is_taken_or_refused_in_a_line(run, draw, times):
    every = [(word, name, value) for word in WORDS for (name, _), value in itertools.product(options(word), VALUES)]
    faults = []
    for word, name, value in draw.sample(every, min(90 * times, len(every))):
        if name == "--resume" and value in ("..", "../..", "-", "--"):
            continue
        faults.append(command(*start(word, run, name), f"{name}={value}").fault(wrong=None))
    report(faults)


def test_several_at_once(run, draw, times):
    faults = []
    for _ in range(30 * times):
        word = draw.choice(list(WORDS))
        line = start(word, run)
        every = list(options(word))
        for name, _ in draw.sample(every, min(3, len(every))):
            if name not in ("--resume", "--out"):
                line += [name, draw.choice(VALUES)]
        draw.random() < 0.2 and line.insert(draw.randrange(len(line)), draw.choice(VALUES))
        faults.append(command(*line).fault(wrong=None))
    report(faults)


FOUND_FIRST = {  # each was a traceback, taken, or found only after work
    "train --seed 4294967296": "seed must be at most 4294967295, got 4294967296",
    f"train --epochs 1 --out {'n' * 300}": "out must be a file or folder",
    f"train --epochs 1 --batch-size {BIG}": "batch_size must be at most 2147483647",
    "train --epochs 1 --method base --lr 1e39": "lr must be at most 1e+30",
    "train --epochs 1 --method base --weight-decay 1e39": "weight_decay must be at most 1e+08",
    f"sharpness RUN --seed {BIG}": "seed must be at most 4294967295",
    f"landscape RUN --direction-seed {BIG} --points 2": "direction_seed must be at most 4294967295",
    "compare --minutes inf --methods base --epochs 1": "minutes must be a finite number > 0, got inf",
    "compare --minutes 1e300 --methods base --epochs 1": "minutes must be at most 525600",
    "report RUN/config.json": "holds no results of a comparison",
    "report RUN --figures=": "figures is empty",
    "report RUN --tensorboard=": "tensorboard is empty",
    "report RUN --out=": "out is empty",
    "report ": "Missing argument",
    "train --epochs 1 --method gsam --rho-min 1": "rho_min must be at most rho, 0.04, got 1.0",
    "compare --methods base,gsam --set gsam.rho_min=1": "rho_min must be at most rho",
    "sharpness RUN --rho 0": "rho must be a finite number > 0, got 0.0",
    "sharpness RUN --rho -1": "rho must be a finite number > 0, got -1.0",
    "sharpness RUN --rho nan": "rho must be a finite number",
    "sharpness RUN --rho inf": "rho must be a finite number",
    "sharpness RUN --eigenvalues 100000000": "eigenvalues must be at most 1000",
    "sharpness RUN --eigenvalues 100": "eigenvalues must be less than the number of weights, 83, got 100",
    "landscape RUN --radius 0": "radius must be a finite number > 0",
    "landscape RUN --radius nan": "radius must be a finite number",
    "landscape RUN RUN --plane": "--plane goes through three runs or checkpoints, got 2",
    "compare --set saf.coefficient=nan": "coefficient must be a finite number >= 0, got nan",
    "compare --set saf.history=foo": "unknown history 'foo'",
    "compare --methods base,sam --set sam.when=x": "unknown when 'x'",
    "compare --methods base,sam --set sam.when=every:x": "is no number",
    "compare --methods base,sam --set sam.when=late:2": "share must be",
    "compare --methods base,sam --set sam.subset=some": "unknown subset 'some'",
    "compare --methods base,sam --set sam.rho=0.1,0": "rho must be a finite number > 0",
    "compare --methods base,mesa --set mesa.decay=1": "decay must be",
    "compare --methods base,lawa --set lawa.statistics=x": "unknown statistics 'x'",
    f"compare --set saf.lag={BIG}": "lag must be at most 10000",
    "compare --methods ,": "methods has a name twice",
    "compare --methods=": "methods must include base",
    "train --method saf --history foo": "unknown history 'foo'",
    "train --method sam --when x": "unknown when 'x'",
    "train --method ema --ema-epochs 0": "ema_epochs must be a finite number > 0",
    "train --data=": "unknown data ''",
    f"train --data idx:{LONG}": "cannot be read",
    "train --model=": "unknown model ''",
    "train --method=": "unknown method ''",
    f"train {LONG}.py": "no such experiment file",
    f"train --resume {LONG}": "resume must be a file or folder",
    "train --resume=": "resume is empty",
    f"sharpness {LONG}": "run must be a file or folder",
    f"report {LONG}": "runs must be a file or folder",
    "train --workers 100000": "workers must be at most 1024",
    "compare --jobs 100000": "jobs must be at most 1024",
}


def test_what_is_wrong_is_said_before_anything_is_begun(run):
    faults, before = [], left()
    for line, said in FOUND_FIRST.items():
        word, *rest = (each.replace("RUN", str(run)) for each in line.split(" "))
        came = command(word, *(each for each in rest if each or word == "x"))
        faults.append(came.fault(wrong=True, said=said, only=True))
    report(faults)
    assert left() == before


def test_the_help_states_the_bounds():
    for word in WORDS:
        came = command(word, "--help")
        assert came.code == 0
        entries = dict(entry.strip().partition(" ")[::2] for entry in re.split(r"\n  (?=--)", came.out))
        for name, number in options(word):
            if number:
                text = " ".join(entries[name].split())
                assert "<= " in text or "< 1" in text, (word, name, text)
