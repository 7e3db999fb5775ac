"""Run folders, never two runs in one."""

import platform
import signal
from datetime import datetime as real_datetime

import pytest

from flatmin.errors import OutputError
from flatmin.lab.runs import folder as folder_module
from flatmin.lab.runs.folder import run_folder


def made(out, name):
    """The folder of a run that has not begun."""
    with run_folder(None if out is None else str(out), name) as folder:
        return folder


@pytest.fixture
def one_second(tmp_path, monkeypatch):
    """All runs start in the same second, in an empty folder."""

    class Clock:
        @staticmethod
        def now():
            return real_datetime(2025, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder_module, "datetime", Clock)


@pytest.mark.usefixtures("one_second")
class TestAFolderUnderRuns:
    def test_it_is_named_by_time_and_run(self):
        assert str(made(None, "saf-seed0")) == "runs/20250102-030405-saf-seed0"

    def test_two_runs_in_one_second_get_two_folders(self):
        folders = [made(None, "saf-seed0") for _ in range(4)]
        assert len(set(folders)) == 4
        assert all(folder.is_dir() for folder in folders)

    def test_runs_that_is_a_file(self, tmp_path):
        (tmp_path / "runs").write_text("")
        with pytest.raises(OutputError, match="runs"):
            made(None, "saf-seed0")


class TestAFolderThatWasAskedFor:
    def test_it_is_made_with_its_parents(self, tmp_path):
        assert made(tmp_path / "a" / "b", "x").is_dir()

    def test_an_empty_one_is_taken(self, tmp_path):
        assert made(str(tmp_path), "x") == tmp_path
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_of_two_runs_at_once_one_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_module, "any", lambda _: False, raising=False)  # both have found it empty
        with run_folder(str(tmp_path), "x"), pytest.raises(OutputError, match="holds something already"):
            made(str(tmp_path), "x")

    def test_one_that_holds_something_is_refused_and_left_alone(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("mine")
        with pytest.raises(OutputError, match="holds something already"):
            made(tmp_path, "x")
        assert (tmp_path / "metrics.jsonl").read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match="file: is a file"):
            made(tmp_path / "file", "x")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("folder", ["/proc/flatmin", "/proc/self/flatmin/run"])
    @pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
    def test_one_that_cannot_be_written(self, folder):
        with pytest.raises(OutputError, match=f"{folder}: cannot be written"):
            made(folder, "x")

    def test_one_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            made(tmp_path / "file" / "run", "x")


class TestAfterAnError:
    def test_what_was_made_goes_again_with_its_parents(self, tmp_path):
        with pytest.raises(KeyError), run_folder(str(tmp_path / "new" / "run"), "x") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "checkpoints").mkdir()
            raise KeyError
        assert not any(tmp_path.iterdir())

    def test_a_folder_that_was_there_stays(self, tmp_path):
        with pytest.raises(KeyError), run_folder(str(tmp_path), "x") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyError
        assert tmp_path.is_dir()
        assert not any(tmp_path.iterdir())

    def test_what_somebody_else_put_there_stays(self, tmp_path):
        with pytest.raises(KeyError), run_folder(str(tmp_path / "run"), "x") as folder:
            (folder / "notes.txt").write_text("theirs")
            raise KeyError
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]

    def test_an_epoch_that_was_done_is_kept(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), run_folder(str(tmp_path / "run"), "x") as folder:
            (folder / "runs" / "base-seed0").mkdir(parents=True)
            (folder / "runs" / "base-seed0" / "metrics.jsonl").write_text("{}\n")
            raise KeyboardInterrupt
        assert (tmp_path / "run" / "runs" / "base-seed0" / "metrics.jsonl").read_text() == "{}\n"

    def test_a_parent_that_somebody_else_uses_stays(self, tmp_path):
        with pytest.raises(KeyError), run_folder(str(tmp_path / "new" / "run"), "x"):
            (tmp_path / "new" / "theirs").write_text("")
            raise KeyError
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


def test_ctrl_c_while_it_is_made_leaves_none(tmp_path, monkeypatch):
    real = folder_module._new_folder

    def interrupted(wanted, *, numbered):
        signal.raise_signal(signal.SIGINT)
        return real(wanted, numbered=numbered)

    monkeypatch.setattr(folder_module, "_new_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "a" / "b", "x")
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_folder_of_that_name_is_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(str(tmp_path / "run"), "x") as folder:
        folder.rename(tmp_path / "moved")
        (folder / "runs").mkdir(parents=True)
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "runs").exists()
