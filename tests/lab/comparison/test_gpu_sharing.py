"""Runs that share a GPU: the service is started, tried, found by processes and ended; or left out, which is said."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flatmin import lab
from flatmin.errors import FlatminWarning
from flatmin.lab.comparison import gpu_sharing
from flatmin.lab.comparison.gpu_sharing import CONTROL, LOG, PIPE, side_by_side
from flatmin.lab.comparison.workers import Workers

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="NVIDIA's service is for Linux")

# Stands in for the driver's program: notes what it is told and where, and serves as the file "answer" says.
PROGRAM = """#!/bin/sh
if [ "$1" = -d ]; then
    echo "start in $CUDA_MPS_PIPE_DIRECTORY$CUDA_VISIBLE_DEVICES" >>"{noted}"
    [ -e "{home}/start hangs" ] && echo $$ >"{home}/pid" && exec sleep 600
    [ -e "{home}/broken" ] && echo "An instance of this daemon is already running" && exit 1
    exit 0
fi
read line
echo "$line in $CUDA_MPS_PIPE_DIRECTORY" >>"{noted}"
[ "$line" = get_server_list ] && cat "{home}/answer"
[ "$line" = quit ] && [ -e "{home}/quit hangs" ] && echo $$ >"{home}/pid" && exec sleep 600
exit 0
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """The folder with the program."""
    path = tmp_path / CONTROL
    path.write_text(PROGRAM.format(home=tmp_path, noted=tmp_path / "noted"))
    path.chmod(0o755)
    (tmp_path / "answer").write_text("4711\n")
    (tmp_path / "noted").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in (PIPE, LOG):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_sharing, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(gpu_sharing, "_ATTACH", "")
    return tmp_path


def seen() -> list[str]:
    """What a process that is started now finds."""
    code = f"import os; print(os.environ.get({PIPE!r}), os.environ.get({LOG!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def noted(home: Path) -> list[str]:
    return (home / "noted").read_text().splitlines()


def ended(home: Path) -> bool:
    """Whether the program that hung is there no more, but perhaps as a zombie of the system's."""
    state = Path(f"/proc/{(home / 'pid').read_text().strip()}/stat")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_processes_find_the_service_which_ends_with_them(service, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # is for them, and not for the service
    with side_by_side(GPU, 2):
        where, logs = seen()
        assert Path(where).is_dir()
        assert logs == where
        assert noted(service) == [f"start in {where}", f"get_server_list in {where}"]
    assert noted(service)[2:] == [f"quit in {where}"]
    assert seen() == ["None", "None"]
    assert not Path(where).exists()


def test_it_ends_after_an_error(service):
    with pytest.raises(KeyboardInterrupt), side_by_side(GPU, 2):
        raise KeyboardInterrupt
    assert noted(service)[-1].startswith("quit in ")
    assert PIPE not in os.environ


def test_it_ends_when_the_comparison_is_killed(service):
    code = (
        "import torch, time; from flatmin.lab.comparison import gpu_sharing\n"
        "gpu_sharing._ATTACH = ''\n"
        "with gpu_sharing.side_by_side(torch.device('cuda'), 2): print(flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert noted(service)[-1].startswith("get_server_list")
        process.kill()
    end = time.monotonic() + 30
    while not noted(service)[-1].startswith("quit in ") and time.monotonic() < end:
        time.sleep(0.05)
    assert noted(service)[-1].startswith("quit in ")


@pytest.mark.parametrize("case", ["one run", "cpu", "theirs", "usual", "amd"])
def test_what_wants_none_is_left_alone(case, service, monkeypatch):
    if case == "theirs":
        monkeypatch.setenv(PIPE, "/dev/null")
    if case == "usual":
        (service / "usual").touch()
    if case == "amd":
        monkeypatch.setattr(torch.version, "hip", "6.0")
    before = seen()
    with side_by_side(torch.device("cpu") if case == "cpu" else GPU, 1 if case == "one run" else 2):
        assert seen() == before
    assert noted(service) == []


def test_none_is_there(service):
    (service / CONTROL).unlink()
    with (
        pytest.warns(
            FlatminWarning, match=f"3 runs share the GPU by turns.*there is no {CONTROL} here; {PIPE}=/dev/null"
        ),
        side_by_side(GPU, 3),
    ):
        assert seen() == ["None", "None"]


FAULTS = {
    "broken": r"did not start \(An instance of this daemon is already running\)",
    "refuses": r"under NVIDIA's MPS the GPU could not be used \(RuntimeError: CUDA error: MPS client failed\)",
    "hangs": "did not answer in 1 s",
    "serves nobody": "has started, but serves nobody",
    "start hangs": "did not start in 1 s",
    "long": "has too long a name",
    "no folder": r"could not be started \(.*No such file or directory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_does_not_serve_is_left_out(fault, service, monkeypatch):
    if fault in ("broken", "start hangs"):
        (service / fault).touch()
    if fault == "refuses":
        monkeypatch.setattr(gpu_sharing, "_ATTACH", "raise RuntimeError('CUDA error: MPS client failed')")
    if fault == "hangs":
        monkeypatch.setattr(gpu_sharing, "_ATTACH", "import time; time.sleep(100)")
    if "hangs" in fault:
        monkeypatch.setattr(gpu_sharing, "PATIENCE", 1.0)
    if fault == "serves nobody":
        (service / "answer").write_text("\n")
    if fault == "long":
        (service / ("x" * 80)).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(service / ("x" * 80)))
    if fault == "no folder":
        monkeypatch.setattr("tempfile.tempdir", str(service / "nowhere"))
    with pytest.warns(FlatminWarning, match=f"2 runs share the GPU by turns.*{FAULTS[fault]}"), side_by_side(GPU, 2):
        assert seen() == ["None", "None"]
    begun = ["start"] if fault in ("broken", "start hangs") else ["start", "quit"]
    begun = [] if fault in ("long", "no folder") else begun
    assert [line.split()[0] for line in noted(service) if "get_server_list" not in line] == begun
    if fault == "start hangs":
        assert ended(service)


def test_one_that_does_not_end_is_killed(service, monkeypatch):
    monkeypatch.setattr(gpu_sharing, "PATIENCE", 1.0)
    (service / "quit hangs").touch()
    with side_by_side(GPU, 2):
        assert seen() != ["None", "None"]
    assert ended(service)


def test_a_comparison_trains_in_it(service, monkeypatch, tmp_path, forked_workers):
    """Its processes are started inside."""
    monkeypatch.setattr(gpu_sharing, "KINDS", {"cpu"})
    found, start = [], Workers._start
    monkeypatch.setattr(Workers, "_start", lambda workers: (found.append(os.environ.get(PIPE)), start(workers))[1])
    recipe = lab.Recipe(epochs=1, train_samples=32, device="cpu")
    lab.compare(recipe, methods=["base"], seeds=2, jobs=2, minutes=0.01, out=tmp_path / "runs")
    assert found
    assert None not in found
    assert noted(service)[-1].startswith("quit in ")
