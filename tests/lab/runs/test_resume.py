"""A run that was ended anywhere is continued, on the CPU bit-identical."""

import contextlib
import copy
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from flatmin._files import locked
from flatmin.errors import DataError, ExperimentError, FlatminWarning, OutputError
from flatmin.lab.methods import METHODS
from flatmin.lab.problems.load import load_problem
from flatmin.lab.runs import checkpoint as checkpoint_module
from flatmin.lab.runs import resume as resume_module
from flatmin.lab.runs import run as run_module
from flatmin.lab.runs import writer as writer_module
from flatmin.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from flatmin.lab.runs.resume import find_run, open_start, read_run
from flatmin.lab.runs.run import resume_run, train_run
from flatmin.lab.training.randomness import Randomness
from flatmin.lab.training.trainer import Trainer
from tests.killed import killed_at

# A data set whose every reading draws from each generator that there is.
RANDOM = """
import random, numpy
from torch.utils.data import Dataset

class Noisy(Dataset):
    def __len__(self): return 42
    def __getitem__(self, i):
        x = torch.full((4,), float(i)) + torch.randn(4) + random.random() + float(numpy.random.rand())
        return x, i % 3

def train_set(): return Noisy()

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
"""


class Ended(Exception):  # noqa: N818 - not an error
    """Stands for whatever ends a run."""


def ending_after(steps):
    """An ``on_step`` that ends the run after so many steps."""
    done = iter(range(steps - 1))

    def on_step():
        if next(done, None) is None:
            raise Ended

    return on_step


def lines(folder):
    return [{**json.loads(line), "seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flat(value, name=""):
    """A nested state as one dictionary; times left out."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items() if "seconds" not in k
        }
    if isinstance(value, list):
        return {k: v for number, item in enumerate(value) for k, v in flat(item, f"{name}.{number}").items()}
    return {name: value}


def assert_same(one, other):
    """Both runs have the same metrics and the same checkpoints, bit-identical."""
    assert lines(one) == lines(other)
    for which in ("last", "best"):
        ours, theirs = (flat(load_checkpoint(folder / "checkpoints" / which)) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[name]), (which, name)
            else:
                assert value == theirs[name], (which, name)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    return tmp_path / "whole"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def noisy(experiment):
    with open(experiment, "a") as file:
        file.write(RANDOM)
    return experiment


class TestToTheBit:
    @pytest.mark.parametrize("method", list(METHODS))
    def test_ended_in_the_middle_of_an_epoch(self, tmp_path, whole, make_run, noisy, method):
        run = make_run(method, epochs=4, seed=2, experiment=noisy)  # of three steps each
        train_run(run, whole)
        for steps in (1, 4, 7, 10):
            folder = tmp_path / f"ended after {steps}"
            folder.mkdir()
            with pytest.raises(Ended):
                train_run(run, folder, on_step=ending_after(steps), checkpoint_minutes=0)
            state = load_checkpoint(folder / "checkpoints/last")
            assert (state["epoch"], state["progress"]["steps"]) == divmod(steps, 3)
            torch.manual_seed(99)
            resume_run(run, folder)
            assert_same(folder, whole)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_that_draw_random_numbers(self, folder, whole, make_run, noisy, workers):
        run = make_run("saf", epochs=2, experiment=noisy, workers=workers)
        train_run(run, whole)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(5), checkpoint_minutes=0)
        resume_run(run, folder)
        assert_same(folder, whole)

    def test_ended_again_and_again(self, folder, whole, make_run, noisy):
        run = make_run("saf", epochs=3, experiment=noisy)
        train_run(run, whole)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(2), checkpoint_minutes=0)
        for _ in range(3):
            with pytest.raises(Ended):
                resume_run(run, folder, on_step=ending_after(2), checkpoint_minutes=0)
        assert load_checkpoint(folder / "checkpoints/last")["epoch"] == 2
        resume_run(run, folder, checkpoint_minutes=0)
        assert_same(folder, whole)

    @pytest.mark.parametrize("method", ["saf", "mesa"])
    def test_checkpoints_change_nothing(self, folder, whole, make_run, noisy, method):
        run = make_run(method, experiment=noisy)
        train_run(run, whole)
        train_run(run, folder, checkpoint_minutes=0)
        assert_same(folder, whole)

    @pytest.mark.parametrize("part", ["random", "totals"])
    def test_what_is_kept_in_the_middle_of_an_epoch_matters(self, folder, whole, make_run, noisy, part, monkeypatch):
        run = make_run("base", epochs=2, experiment=noisy)
        train_run(run, whole)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(4), checkpoint_minutes=0)
        if part == "random":
            monkeypatch.setattr(Randomness, "go_on", lambda self: None)
        else:
            state = load_checkpoint(folder / "checkpoints/last")
            state["ranks"][0]["totals"].zero_()
            save_checkpoint(folder / "checkpoints/last", state)
        resume_run(run, folder)
        assert lines(folder) != lines(whole)

    def test_a_training_that_is_killed_at_any_operation_on_files(self, tmp_path, whole, make_run, experiment):
        run = make_run("saf", epochs=2, batch_size=32, experiment=experiment)
        train_run(run, whole)
        number, killed = 1, True
        while killed:
            folder = tmp_path / str(number)
            folder.mkdir()
            killed = killed_at(number, lambda folder=folder: train_run(run, folder, checkpoint_minutes=0))
            if (folder / "config.json").exists():
                assert read_run(folder).seed == 0
                resume_run(run, folder, checkpoint_minutes=0)
                assert_same(folder, whole)
            number += 6
        assert number > 60


class TestBest:
    @pytest.mark.parametrize("ended", [3, 5, 8, 11])
    def test_it_is_the_first_epoch_with_the_highest_accuracy(self, folder, make_run, experiment, monkeypatch, ended):
        accuracies = {0: 0.3, 1: 0.9, 2: 0.5, 3: 0.9}
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (1.0, accuracies[self.epoch]))
        run = make_run("base", epochs=4, batch_size=20, experiment=experiment)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(ended), checkpoint_minutes=0)
        resume_run(run, folder)
        assert load_checkpoint(folder / "checkpoints/best")["epoch"] == 2

    def test_it_is_made_again_if_the_crash_came_before_it(self, folder, make_run, experiment, monkeypatch):
        def crash(*_, **__):
            raise Ended

        run = make_run("base", epochs=2, experiment=experiment)
        monkeypatch.setattr(writer_module, "copy_checkpoint", crash)
        with pytest.raises(Ended):
            train_run(run, folder)
        monkeypatch.undo()
        assert not (folder / "checkpoints/best").exists()
        assert not (folder / "metrics.jsonl").exists()
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (1.0, 0.0))  # worse than any before
        resume_run(run, folder)
        assert load_checkpoint(folder / "checkpoints/best")["epoch"] == 1
        assert [line["epoch"] for line in lines(folder)] == [0, 1]


class TestWhere:
    @pytest.fixture
    def ended(self, folder, make_run, experiment):
        """A run of three epochs that was ended in its last."""
        run = make_run("saf", experiment=experiment)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(10))
        return run

    def test_the_run_is_found_by_its_folder_or_one_of_its_checkpoints(self, folder, ended):
        assert find_run(folder) == (folder, None)
        assert find_run(folder / "checkpoints/best") == (folder, folder / "checkpoints/best")
        assert read_run(folder) == ended

    def test_it_is_found_by_relative_paths_and_links(self, folder, ended, monkeypatch, tmp_path):
        last = folder / "checkpoints/last"
        (tmp_path / "link").symlink_to(last)
        assert find_run(tmp_path / "link") == (folder, last)
        monkeypatch.chdir(folder / "checkpoints")
        assert find_run(Path("last")) == (folder, last)
        monkeypatch.chdir(last)
        assert find_run(Path()) == (folder, last)
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        with pytest.raises(DataError, match="no run there to continue"):
            find_run(tmp_path / "circle")

    def test_from_a_checkpoint_that_was_asked_for(self, folder, whole, ended):
        train_run(ended, whole)
        resume_run(ended, folder)
        for which in ("previous", "best", "last"):
            resume_run(ended, folder, folder / "checkpoints" / which)
            assert_same(folder, whole)

    @pytest.mark.parametrize("path", ["nowhere", "", "whole"])
    def test_no_run(self, tmp_path, whole, path):
        with pytest.raises(DataError, match="no run there to continue"):
            find_run(tmp_path / path)

    def test_a_finished_run_stays_as_it_is(self, folder, ended):
        last = resume_run(ended, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        called = []
        assert resume_run(ended, folder, on_epoch=called.append) == last
        assert called == []
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_run_without_a_checkpoint_begins_at_its_start(self, folder, whole, ended):
        train_run(ended, whole)
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()
        resume_run(ended, folder)
        assert_same(folder, whole)

    def test_a_damaged_one_is_never_used_and_the_others_are_named(self, folder, ended):
        (folder / "checkpoints/last/state.json").write_text("{}")
        with pytest.raises(DataError) as caught:
            resume_run(ended, folder)
        text = str(caught.value)
        assert f"{folder}/checkpoints/last: the checkpoint is damaged: state.json: " in text
        previous = folder / "checkpoints/previous"
        assert f"; {previous} holds epoch 1: flatmin train --resume {previous}" in text

    def test_a_damaged_one_does_not_push_out_the_good_one(self, folder, ended):
        (folder / "checkpoints/last/state.json").write_text("{}")
        with pytest.raises(Ended):
            resume_run(ended, folder, folder / "checkpoints/previous", on_step=ending_after(1), checkpoint_minutes=0)
        assert load_checkpoint(folder / "checkpoints/last")["progress"]["steps"] == 1
        assert load_checkpoint(folder / "checkpoints/previous")["epoch"] == 1

    @pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "when there is room"), (errno.EIO, "to go on")])
    def test_when_no_other_can_be_written_it_names_the_one_it_was_started_from(
        self, folder, ended, monkeypatch, number, said
    ):
        def full(*_, **__):
            raise OSError(number, os.strerror(number))

        previous = folder / "checkpoints/previous"
        (folder / "checkpoints/last/state.json").write_text("{}")
        monkeypatch.setattr(checkpoint_module, "_put", full)
        monkeypatch.setattr(writer_module, "copy_checkpoint", lambda *_, **__: None)
        with pytest.raises(OutputError) as caught:
            resume_run(ended, folder, previous, checkpoint_minutes=0)
        assert f"; {previous}, which it was started from, is intact; {said}: flatmin train" in str(caught.value)
        assert str(caught.value).endswith(f" --resume {previous}")

    def test_when_none_is_whole_it_says_so(self, folder, ended):
        for path in folder.glob("checkpoints/*/tensors.safetensors"):
            path.write_bytes(b"")
        with pytest.raises(DataError, match="there is no other intact checkpoint, so the run must be started anew"):
            resume_run(ended, folder)

    def test_a_crash_between_the_renames(self, folder, ended):
        (folder / "checkpoints/last").rename(folder / "checkpoints/last.new")
        assert find_run(folder / "checkpoints/last") == (folder, folder / "checkpoints/last")
        resume_run(ended, folder, folder / "checkpoints/last")
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best", "last", "previous"]

    def test_only_the_first_rank_settles(self, folder, ended, monkeypatch):
        """When another reads, the first may be writing already."""
        (folder / "checkpoints/best.new").mkdir()
        monkeypatch.setattr(resume_module._distributed, "rank", lambda: 1)
        open_start(folder, None, ended)
        assert (folder / "checkpoints/best.new").exists()
        monkeypatch.undo()
        open_start(folder, None, ended)
        assert not (folder / "checkpoints/best.new").exists()


class TestDoesNotFit:
    @pytest.fixture
    def ended(self, folder, make_run, experiment):
        def end(method="saf", **options):
            run = make_run(method, experiment=experiment, **options)
            with pytest.raises(Ended):
                train_run(run, folder, on_step=ending_after(6), checkpoint_minutes=0)
            return run

        return end

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"randn(60": "randn(70"}, "training samples was 60 and is 70, test samples was 60 and is 70"),
            ({"(8, 3)": "(8, 5)"}, "classes was 3 and is 5"),
            (
                {"(8": "(9", "4, 8": "4, 9"},
                "model.0.weight is float32 of shape (8, 4), this run's is float32 of shape (9",
            ),
            ({"nn.ReLU": "nn.PReLU"}, "only one of them has 2.weight"),
        ],
    )
    def test_the_problem_has_changed(self, folder, ended, experiment, changes, said):
        run, text = ended(), Path(experiment).read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        Path(experiment).write_text(text)
        with pytest.raises(DataError, match="checkpoints/last: the checkpoint does not fit this run: ") as caught:
            resume_run(run, folder)
        assert said in str(caught.value)

    def test_the_configuration_has_changed(self, folder, ended, make_run, experiment):
        ended()
        with pytest.raises(DataError, match=r"belongs to another run than config.json: epochs was 3 and is 5"):
            resume_run(make_run("saf", epochs=5, experiment=experiment), folder)
        with pytest.raises(DataError, match="method was 'saf' and is 'mesa'"):
            resume_run(make_run("mesa", experiment=experiment), folder)

    def test_another_version_of_torch_is_warned_of(self, folder, ended):
        run = ended()
        state = load_checkpoint(folder / "checkpoints/last")
        state["torch"] = "1.0"
        state["scheduler"]["no_longer_there"] = 3
        save_checkpoint(folder / "checkpoints/last", state)
        with pytest.warns(FlatminWarning, match=r"torch was '1.0' and is .*not be bit-identical"):
            resume_run(run, folder)

    @pytest.mark.parametrize(
        "numbers",
        [
            [torch.zeros(624, dtype=torch.int64), 10**9, 0, 0.0],
            [torch.zeros(624, dtype=torch.int64), -1, 0, 0.0],
            [torch.zeros(624, dtype=torch.int64), 624, 2, 0.0],
            [torch.zeros(623, dtype=torch.int64), 3, 0, 0.0],
            [torch.full((624,), 2**32), 3, 0, 0.0],
            [torch.zeros(624), 3, 0, 0.0],
        ],
    )
    def test_a_random_state_with_which_numpy_would_crash(self, folder, ended, numbers):
        run = ended()
        state = load_checkpoint(folder / "checkpoints/last")
        state["ranks"][0]["random"]["numpy"] = numbers
        save_checkpoint(folder / "checkpoints/last", state)
        with pytest.raises(DataError, match="numpy's random state is invalid"):
            resume_run(run, folder)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("method", "optimizer"), [("saf", "sgd"), ("mesa", "adamw")])
    def test_a_state_with_anything_out_of_place_is_refused_or_harmless(
        self, folder, ended, method, optimizer, monkeypatch
    ):
        """Every entry in turn is left out, or replaced by something of another shape, dtype, type or value."""
        run = ended(method, optimizer=optimizer)
        checkpoint = folder / "checkpoints/last"
        state, refused, before = load_checkpoint(checkpoint), 0, content(checkpoint)
        problem = load_problem(run.recipe, seed=run.seed)
        monkeypatch.setattr(run_module, "load_problem", lambda *_, **__: problem)
        for change in changes(state):
            changed = copy.deepcopy(state)
            change(changed)
            save_checkpoint(folder / "changed", changed, durable=False)
            with pytest.raises((Ended, DataError)) as caught:
                resume_run(run, folder, folder / "changed", on_step=ending_after(2))
            if caught.type is DataError:
                assert "changed: " in str(caught.value)
                refused += 1
            assert content(checkpoint) == before
        assert refused > 200

    def test_nor_does_one_of_a_finished_run_end_in_another_error(self, folder, make_run, experiment):
        run = make_run("base", epochs=2, experiment=experiment)
        train_run(run, folder)
        state, refused = load_checkpoint(folder / "checkpoints/last"), 0
        for name in ("metrics", "progress", "epoch", "run", "extra_bytes"):
            for change in changes({name: state[name]}):
                changed = copy.deepcopy(state)
                change(changed)
                save_checkpoint(folder / "changed", changed, durable=False)
                with contextlib.suppress(DataError):
                    resume_run(run, folder, folder / "changed")
                    continue
                refused += 1
        assert refused > 50

    def test_the_others_are_named_whatever_they_hold(self, folder, ended):
        run = ended()
        state = load_checkpoint(folder / "checkpoints/previous")
        save_checkpoint(folder / "checkpoints/best", {**state, "epoch": float("inf")})
        (folder / "checkpoints/last/state.json").write_text("{}")
        with pytest.raises(DataError, match="previous holds epoch 1") as caught:
            resume_run(run, folder)
        assert "best" not in str(caught.value)

    @pytest.mark.parametrize(("name", "value"), [("processes", 2), ("workers", 3)])
    def test_another_number_of_processes_or_workers_is_warned_of(self, folder, ended, name, value):
        run = ended()
        state = load_checkpoint(folder / "checkpoints/last")
        state[name] = value
        save_checkpoint(folder / "checkpoints/last", state)
        with pytest.warns(FlatminWarning, match=f"{name} was {value} and is .*not be bit-identical"):
            resume_run(run, folder)


def changes(state, path=()):
    """Functions that each change one entry of a nested state; of a long list, its ends."""

    def at(changed, path):
        for key in path:
            changed = changed[key]
        return changed

    number = len(path)
    if isinstance(state, dict):
        keys = list(state)
    elif isinstance(state, list):
        keys = sorted({0, len(state) - 1}) if state else []
    else:
        return
    for key in keys:
        value = state[key]
        if path[:1] == ("run",) and len(path) > 1:
            continue
        number += 1
        yield lambda changed, key=key: at(changed, path).pop(key)
        wrong = ["text", [[]], {"a": {}}, torch.ones(7, 7, 7), torch.ones(3, dtype=torch.int16), b"bytes"]
        others = [wrong[number % 6], wrong[(number + 2) % 6]]
        if isinstance(value, (int, float)):
            others += [0, -1, float("inf")]
        elif isinstance(value, list):
            others += [[0] * len(value)]
        for other in others:
            yield lambda changed, key=key, other=other: at(changed, path).__setitem__(key, other)
        yield from changes(value, (*path, key))


class TestConfiguration:
    @pytest.fixture
    def config(self, folder, make_run, experiment):
        train_run(make_run("saf", epochs=1, experiment=experiment), folder)
        return folder / "config.json"

    @pytest.mark.parametrize(
        "content",
        [
            "[",
            "[]",
            "3",
            "{}",
            '{"method": 3}',
            "[" * 10**5,
            "\0",
            '{"method": "saf", "recipe": {}, "settings": [], "seed": 0}',
            '{"method": "saf", "recipe": {"colour": 1}, "settings": {}, "seed": 0}',
            '{"method": "saf", "recipe": {}, "settings": {}, "seed": "x"}',
            '{"method": "saf", "recipe": {"epochs": "x"}, "settings": {}, "seed": 0}',
        ],
    )
    def test_one_that_is_none(self, folder, config, content):
        config.write_text(content)
        with pytest.raises(DataError, match=r"config.json: not the configuration of a run"):
            read_run(folder)

    def test_a_run_that_was_ended_before_it_began(self, folder, config):
        config.write_text("")
        with pytest.raises(DataError, match=r"config.json is empty: the run ended before training began; remove"):
            read_run(folder)

    def test_a_comparison(self, folder, config):
        config.write_text('{"rows": []}')
        with pytest.raises(DataError, match="is a comparison"):
            read_run(folder)

    def test_the_experiment_file_is_used_while_it_is_the_same(self, folder, config, experiment):
        assert read_run(folder).recipe.experiment == experiment

    def test_one_that_has_changed(self, folder, config, experiment):
        with open(experiment, "a") as file:
            file.write("# another thought")
        with pytest.raises(ExperimentError, match=rf"{experiment} has changed since .* {folder}/experiment.py has not"):
            read_run(folder)

    def test_one_that_is_gone_is_taken_from_its_copy(self, folder, make_run, experiment, whole):
        run = make_run("saf", experiment=experiment)
        train_run(run, whole)
        with pytest.raises(Ended):
            train_run(run, folder, on_step=ending_after(6))
        Path(experiment).unlink()
        with pytest.raises(ExperimentError, match=rf"is not there; {folder}/experiment.py .* --trust-experiment"):
            read_run(folder)
        found = read_run(folder, trust_experiment=True)
        assert found.recipe.experiment == str(folder / "experiment.py")
        resume_run(found, folder)
        sys.modules.pop("experiment", None)
        assert lines(folder) == lines(whole)


def hold(folder, held, done):
    with locked(folder):
        held.set()
        done.wait(60)


def hold_and_fork(folder, forked, pid):
    def child():
        pid.value = os.getpid()
        forked.set()
        time.sleep(60)

    with locked(folder):
        multiprocessing.get_context("fork").Process(target=child).start()
        time.sleep(60)


class TestLock:
    def test_of_two_processes_the_second_is_refused(self, folder, make_run, experiment):
        context = multiprocessing.get_context("spawn")
        held, done = context.Event(), context.Event()
        process = context.Process(target=hold, args=(folder, held, done))
        process.start()
        try:
            assert held.wait(60)
            for start in (train_run, resume_run):
                with pytest.raises(OutputError, match="another process is writing this run at the moment"):
                    start(make_run("base", experiment=experiment), folder)
            process.kill()  # and the kernel lets go of it
            process.join()
            train_run(make_run("base", epochs=1, experiment=experiment), folder)
        finally:
            process.kill()
            process.join()
        assert not (folder / ".lock").exists()

    def test_a_worker_that_was_forked_does_not_hold_it(self, folder):
        """It lives on when its parent is killed, who cannot give the lock back."""
        context = multiprocessing.get_context("spawn")
        forked, pid = context.Event(), context.Value("i", 0)
        process = context.Process(target=hold_and_fork, args=(folder, forked, pid))
        process.start()
        try:
            assert forked.wait(60)
            process.kill()
            process.join()
            assert (folder / ".lock").exists()
            with locked(folder):
                pass
            os.kill(pid.value, 0)  # it is still there
        finally:
            process.kill()
            process.join()
            if pid.value:
                os.kill(pid.value, signal.SIGKILL)

    def test_the_last_holder_may_remove_it_at_any_moment(self, folder, monkeypatch):
        fcntl = pytest.importorskip("fcntl")
        flock, path = fcntl.flock, folder / ".lock"

        def late(file, operation):
            monkeypatch.setattr(fcntl, "flock", flock)
            flock(file, operation)
            path.unlink()

        monkeypatch.setattr(fcntl, "flock", late)
        monkeypatch.setattr(Path, "exists", lambda self: True)  # as a moment ago
        with locked(folder):
            assert path.is_file()
            with pytest.raises(OutputError, match="another process"), locked(folder):
                pass

    def test_only_a_file_system_without_locks_goes_without(self, folder, monkeypatch):
        fcntl = pytest.importorskip("fcntl")

        def refuse(number):
            def flock(*_):
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(fcntl, "flock", flock)

        refuse(errno.ENOLCK)
        with locked(folder), locked(folder):
            pass
        refuse(errno.EIO)
        with pytest.raises(OutputError, match="cannot be locked"), locked(folder):
            pass

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(OutputError, match="nowhere: cannot be written"), locked(tmp_path / "nowhere"):
            pass

    def test_without_such_locks_nothing_is_locked(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with locked(folder), locked(folder):
            pass


@pytest.mark.parametrize(("minutes", "saves"), [(0, 9 + 3), (1e-9, 9 + 3), (10, 3)])
def test_how_often_a_checkpoint_is_written(folder, make_run, experiment, monkeypatch, minutes, saves):
    count = []
    save = writer_module.save_checkpoint
    monkeypatch.setattr(writer_module, "save_checkpoint", lambda *a, **k: (count.append(1), save(*a, **k)))
    run_module.train_run(make_run("base", experiment=experiment), folder, checkpoint_minutes=minutes)
    assert len(count) == saves
