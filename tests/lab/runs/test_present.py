"""What is removed while a run trains is missed at its next epoch, and said: what is lost, and what remains."""

import json
import shutil

import pytest

from flatmin import lab
from flatmin.errors import FlatminWarning, OutputError
from flatmin.lab.comparison import run as run_module
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.runs.checkpoint import load_checkpoint
from flatmin.lab.runs.train import RunInterrupted


@pytest.fixture
def train(experiment, tmp_path):
    """Trains five epochs and does something to the folder after the second; resumed ones after their first."""
    folder = tmp_path / "run"

    def call(action, *, after=1, resumed=False, **options):
        def epoch_done(metrics):
            if metrics["epoch"] == after:
                action(folder)

        recipe = lab.Recipe(experiment=experiment, epochs=5, batch_size=16, device="cpu")
        if resumed:

            def end(metrics):
                raise KeyboardInterrupt

            with pytest.raises(RunInterrupted):
                lab.train(recipe, method="base", out=folder, on_epoch=end, **options)
            return lab.resume(folder, on_epoch=epoch_done)
        return lab.train(recipe, method="base", out=folder, on_epoch=epoch_done, **options)

    call.folder = folder
    return call


def move(folder):
    folder.rename(folder.with_name("moved"))


def replace(folder):
    move(folder)
    (folder / "runs").mkdir(parents=True)
    (folder / "config.json").write_text("somebody else's")


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("action", [shutil.rmtree, move, replace], ids=lambda action: action.__name__)
def test_the_folder(train, action, resumed):
    with pytest.raises(OutputError, match=r"run: the folder was removed or moved .* 3 epochs has gone with it"):
        train(action, resumed=resumed)
    left = sorted(path.name for path in train.folder.rglob("*")) if train.folder.exists() else None
    assert left == (["config.json", "runs"] if action is replace else None)  # nothing of ours is made anew or removed
    if action is not shutil.rmtree:
        shutil.rmtree(train.folder, ignore_errors=True)
        train.folder.with_name("moved").rename(train.folder)
        assert lab.resume(train.folder).metrics["epoch"] == 4


def test_the_folder_within_an_epoch(train):
    with pytest.raises(OutputError, match="removed or moved"):
        train(shutil.rmtree, checkpoint_minutes=0)
    assert not train.folder.exists()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_the_metrics(train, how, resumed):
    def action(folder):
        (folder / "metrics.jsonl").unlink()
        if how == "cut short":
            (folder / "metrics.jsonl").write_text("{}\n")

    with pytest.raises(OutputError, match=r"metrics.jsonl: was removed or changed .* 3 epochs are kept in .*--resume"):
        train(action, resumed=resumed)
    whole = lab.resume(train.folder).metrics
    lines = [json.loads(line) for line in (train.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(5))
    assert whole.items() >= lines[-1].items()


def test_the_configuration(train):
    with pytest.raises(OutputError, match=r"config.json: was removed .* 3 epochs are kept in .*put it back"):
        train(lambda folder: (folder / "config.json").unlink())
    assert load_checkpoint(train.folder / "checkpoints" / "last")["epoch"] == 3


def test_checkpoints_are_made_anew(train):
    done = train(lambda folder: shutil.rmtree(folder / "checkpoints"))
    assert done.metrics["epoch"] == 4
    assert load_checkpoint(train.folder / "checkpoints" / "last")["epoch"] == 5


def test_with_metrics_and_no_checkpoint_it_starts_from_the_beginning(train):
    """Whatever took the checkpoints; the lines are then those of the new epochs alone."""
    with pytest.raises(OutputError):
        train(lambda folder: (folder / "metrics.jsonl").unlink())
    (train.folder / "metrics.jsonl").write_text("{}\n" * 3)
    shutil.rmtree(train.folder / "checkpoints")
    lab.resume(train.folder)
    assert len((train.folder / "metrics.jsonl").read_text().splitlines()) == 5


class TestComparison:
    @pytest.fixture
    def compare(self, experiment, tmp_path, monkeypatch):
        """Compares in this process, two seeds of a row; after so many runs something is done to the folder."""
        folder = tmp_path / "comparison"
        folder.mkdir()

        def call(action, after):
            class Inline:
                def __init__(self, function, jobs, threads):
                    self.function, self.results, self.left, self.warned = function, {}, [], []

                unfinished = property(lambda self: len(self.left))

                def submit(self, name, *arguments):
                    self.left.append((name, arguments))

                def wait(self, seconds):
                    name, arguments = self.left.pop(0)
                    if len(self.results) == after:
                        action(folder)
                    self.results[name] = self.function(*arguments, *(lambda *_: None,) * 3)
                    return 0

                def stop(self, hurry):
                    pass

            monkeypatch.setattr(run_module, "Workers", Inline)
            recipe = lab.Recipe(experiment=experiment, epochs=2, batch_size=16, device="cpu")
            rows = make_rows(["base"], {}, epochs=2)
            return Comparison(recipe, rows, folder, seeds=2, timed=False).run(), folder

        return call

    @pytest.mark.parametrize("action", [shutil.rmtree, move, replace], ids=lambda action: action.__name__)
    def test_its_folder(self, compare, action, tmp_path):
        with pytest.raises(OutputError, match="comparison: the folder was removed or moved while the comparison ran"):
            compare(action, 1)
        assert (tmp_path / "comparison").exists() is (action is replace)

    def test_the_folder_of_a_run_that_is_done(self, compare):
        with pytest.warns(FlatminWarning, match=r"removed while .* ran: base-seed0; their results are kept"):
            found, folder = compare(lambda folder: shutil.rmtree(folder / "runs" / "base-seed0"), 1)
        assert found.seeds == [0, 1]
        assert json.loads((folder / "results.json").read_text())["seeds"] == [0, 1]
