"""``flatmin compare`` from the command line to the table, its files and its processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatmin.lab.comparison.outcome import Outcome
from flatmin.lab.report import write_report

FLAGS = "--methods --seeds --set --minutes --jobs --out --data --model --epochs --batch-size --lr --optimizer"


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text(), parse_constant=pytest.fail)


def in_session(number):
    """The processes of a session that are alive, which is all that a command started there has left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.append(int(path.parent.name))
    return found


def none_left(session):
    """Whether a session's processes end within ten seconds; multiprocessing's own tracker ends last."""
    return any(not in_session(session) or time.sleep(0.1) for _ in range(100))


@pytest.fixture
def rows(monkeypatch):
    """Stands for the comparison itself: notes the rows and options it was given and does nothing."""
    noted = {}

    class Noting:
        def __init__(self, recipe, rows, folder, **options):
            noted.update(recipe=recipe, rows=rows, **options)

        def run(self):
            return Outcome(noted["recipe"], noted["rows"])

    monkeypatch.setattr("flatmin.lab.comparison.compare.Comparison", Noting)
    return noted


@pytest.mark.parametrize("flag", FLAGS.split())
def test_every_flag_is_explained(flatmin, flag):
    assert re.search(rf"^ +{flag}\b.*\w", flatmin("compare", "--help").out, flags=re.MULTILINE)


class TestRows:
    def test_by_default_all_methods_as_they_are_fixed(self, flatmin, rows):
        assert flatmin("compare").code == 0
        assert [row.label for row in rows["rows"]] == ["base", "smoothing", "logit_squeezing", "sam", "saf", "mesa"]
        assert (rows["seeds"], rows["minutes"], rows["recipe"].epochs) == (None, 3.0, 60)

    @pytest.mark.parametrize(
        ("settings", "labels"),
        [
            (["saf.coefficient=0.8"], ["saf coefficient=0.8"]),
            (["saf.coefficient=0.3,0.8"], ["saf coefficient=0.3", "saf coefficient=0.8"]),
            (["saf.lag=1", "saf.lag=2"], ["saf lag=1", "saf lag=2"]),
            (["saf.lag=1,2", "saf.temperature=3"], ["saf lag=1 temperature=3", "saf lag=2 temperature=3"]),
        ],
    )
    def test_forms_of_set(self, flatmin, rows, settings, labels):
        options = [option for setting in settings for option in ("--set", setting)]
        assert flatmin("compare", "--methods", "saf, base", *options).code == 0
        assert [row.label for row in rows["rows"]] == ["base", *labels]

    def test_values_have_the_type_of_their_hyperparameter(self, flatmin, rows):
        flatmin("compare", "--methods", "base,saf,mesa", "--set", "saf.lag=2", "--set", "mesa.ema_epochs=3")
        assert rows["rows"][1].settings["lag"] == 2
        assert isinstance(rows["rows"][1].settings["lag"], int)
        assert isinstance(rows["rows"][2].settings["ema_epochs"], float)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("saf", "must look like saf.coefficient=0.8"),
            ("saf.lag", "must look like"),
            ("saf.lag=", "must look like"),
            ("lag=3", "must look like"),
            ("saf.lag=1.5", "lag must be an integer, got '1.5'"),
            ("saf.coefficient=a", "coefficient must be a number, got 'a'"),
            ("saf.coefficient=0.3,", "coefficient must be a number, got ''"),
            ("saf.coeficient=1", "no hyperparameter 'coeficient', did you mean coefficient"),
            ("suf.lag=1", "unknown method 'suf', did you mean saf"),
            ("sam.lag=1", "sam has no hyperparameter 'lag'"),
        ],
    )
    def test_forms_that_cannot_be(self, flatmin, setting, message):
        found = flatmin("compare", "--set", setting)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert message in found.err
        assert not Path("runs").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda kind: kind.name)
def test_ctrl_c_once_the_comparison_is_done_is_one_line_and_exit_code_2(flatmin, monkeypatch, kind):
    class Done:
        def __init__(self, recipe, rows, folder, **_):
            self.found = Outcome(recipe, rows)

        def run(self):
            self.found.metrics = {row.label: {0: {"test_accuracy": 0.9}} for row in self.found.rows}
            return self.found

    def interrupted(sources):
        signal.raise_signal(kind)

    monkeypatch.setattr("flatmin.lab.comparison.compare.Comparison", Done)
    monkeypatch.setattr("flatmin.lab.report.write_report", interrupted)
    found = flatmin("compare", "--out", "run")
    said = "flatmin: warning: interrupted while writing the report; the comparison itself is complete, kept in run\n"
    assert (found.code, found.err) == (2, said)
    assert "1 finished seed: too few" in found.out


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
class TestTheRealThing:
    def test_table_files_and_verdict(self, flatmin, experiment):
        options = "--methods base,sam,saf --set saf.lag=1,2 --set saf.start_epoch=1 --epochs 3 --seeds 2 --jobs 2"
        found = flatmin("compare", experiment(), *options.split(), "--minutes", 0.1, "--batch-size", 16)
        (folder,) = Path("runs").glob("*-compare")
        written = results(folder)
        labels = ["base", "sam", "saf lag=1 start_epoch=1", "saf lag=2 start_epoch=1"]
        assert found.code == 0
        assert [row["label"] for row in written["rows"]] == labels
        assert written["seeds"] == [0, 1]
        assert len(list((folder / "runs").iterdir())) == 8
        assert found.err.splitlines()[0] == "timing the steps"
        assert found.err.splitlines()[-1] == "2 of 2 seeds done"
        for row in written["rows"]:
            assert f"{row['accuracy']['mean']:.2f} ± {row['accuracy']['half']:.2f}" in found.out
            assert f"{row['step_ratio']:.2f}x" in found.out
        for row in written["rows"][1:]:
            assert f"{row['difference']['mean']:+.2f} ± {row['difference']['half']:.2f}" in found.out
        assert written["rows"][1]["step_ratio"] > 1
        *_, path, last = found.out.splitlines()
        assert path == f"Every seed's numbers: {folder / 'results.json'}"
        assert f"The report, for any browser: {folder / 'report.html'}" in found.out
        assert written["verdict"] == last
        assert last in (folder / "report.html").read_text()
        assert last == "2 finished seeds: too few for a claim, which takes 5."

    @pytest.fixture
    def started(self, experiment):
        """A comparison in a session of its own, which is ended with it; and what interrupts it as a terminal does."""
        command = [sys.executable, "-m", "flatmin", "compare", experiment(), "--methods=base,sam", "--epochs=40"]
        command += ["--seeds=1000", "--jobs=2", "--minutes=0.1", "--out=run"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:

            def interrupt_after(pattern, first=lambda: None):
                assert any(re.match(pattern, line) for line in process.stderr)
                first()
                os.killpg(process.pid, signal.SIGINT)  # reaches the workers too
                out, err = process.communicate(timeout=60)
                return out, err, process

            yield interrupt_after
            for left in in_session(process.pid):
                os.kill(left, signal.SIGKILL)

    def test_ctrl_c_keeps_the_finished_seeds_says_so_and_leaves_no_process(self, flatmin, started):
        out, err, process = started(r"[1-9]\d* of 1000 seeds done", lambda: write_report(["run"], "meanwhile.html"))
        assert "has not come to its end" in Path("meanwhile.html").read_text()
        written = results("run")
        assert process.returncode == 2
        finished = len(written["seeds"])
        said = f"flatmin: interrupted: {finished} seed{'s' if finished > 1 else ''} finished, kept in run; "
        said += "the same command with --out run goes on"
        assert err.splitlines()[-1] == said
        assert "Traceback" not in err
        assert none_left(process.pid)
        assert written["interrupted"] is True
        assert 1 <= len(written["seeds"]) < 1000
        assert re.search(rf"{len(written['seeds'])} seeds?, 40 epochs", out)
        assert "The comparison was interrupted" in write_report(["run"]).read_text()

    def test_ctrl_c_while_the_workers_start_is_one_line_too(self, flatmin, started):
        _, err, process = started("0 of 1000 seeds done")
        assert process.returncode == 2
        assert err.splitlines()[-1] == "flatmin: interrupted: no epoch was done"
        assert "Traceback" not in err
        assert not Path("run").exists()
