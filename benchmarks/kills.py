"""What a kill leaves: signals at random moments of every word of the command, and what is wrong afterwards.

Each case starts ``flatmin`` in a session of its own on a problem that trains in seconds and sends SIGKILL, SIGTERM,
SIGINT, or SIGINT twice, to the process or to its group, at a moment that is drawn from the first at which it takes
signals on, by the work that its processes have done of what they do undisturbed. Then: no process of the session is
left; no file is half written; after SIGTERM and SIGINT the exit code is 2, one line says what was kept and is true, and
nothing is left over; a run goes on to the metrics of one that was never ended, a landscape to its losses. A case that
had ended before counts for nothing and is drawn again.

    python benchmarks/kills.py --kills 120 --out benchmarks/results/kills.json
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flatmin import lab
from flatmin.errors import FlatminError
from flatmin.lab.report import write_report
from flatmin.lab.runs.checkpoint import load_checkpoint
from flatmin.lab.runs.record import command_line, environment, write_json

EXPERIMENT = """
import time
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def _set(seed):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(dim=1))

def train_set():
    return _set(1)

def test_set():
    return _set(2)

def criterion():
    def loss(logits, target):
        time.sleep(0.01)
        return nn.functional.cross_entropy(logits, target)
    return loss
"""
METHODS = ("saf", "mesa", "sam")
EPOCHS, HALF = 12, 3
TRAIN = ["--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu"]
COMPARE = "--methods base,sam --seeds 2 --jobs 2 --look 3 --minutes 0.1 --epochs 3 --batch-size 16 --device cpu"
LANDSCAPE = {"points": 9, "directions": 2}
SIGNALS = {
    "KILL": [signal.SIGKILL],
    "TERM": [signal.SIGTERM],
    "INT": [signal.SIGINT],
    "INT twice": [signal.SIGINT, signal.SIGINT],
}
PROGRESS = re.compile(r"timing the steps|\d+ of \d+ seeds done|sharpness of \S+|.* logits|density of the \w+|[\w-]+")


@dataclass
class Case:
    """One kill: what is killed, how and when, and what is found."""

    word: str
    signal: str
    group: bool
    method: str
    share: float  # of the time that the word takes undisturbed
    gap: float  # seconds between two signals
    wrong: list[str] = field(default_factory=list)
    line: str = ""
    code: int | None = None
    hit: bool = False

    def expect(self, holds: bool, what: str) -> None:
        """Notes what does not hold."""
        if not holds:
            self.wrong.append(what)


class Bench:
    """What all cases share: the experiment, a finished run of each method, half of one, a comparison."""

    def __init__(self, folder: Path, methods: Sequence[str] = METHODS) -> None:
        self.folder, self.methods = folder, methods
        self.seconds: dict[str, float] = {}
        self.experiment = folder / "problem.py"
        self.experiment.write_text(EXPERIMENT)
        self.metrics: dict[str, dict[str, float]] = {}
        for method in methods:
            recipe = lab.Recipe(experiment=str(self.experiment), epochs=EPOCHS, batch_size=16, device="cpu")
            self.metrics[method] = dict(lab.train(recipe, method=method, out=folder / method).metrics)
            with suppress(KeyboardInterrupt):
                lab.train(recipe, method=method, out=folder / f"{method}-half", on_epoch=_end_after(HALF))
        lab.measure_sharpness(folder / "saf")
        self.losses = lab.measure_landscape(folder / "saf", **LANDSCAPE).landscape.loss  # type: ignore[arg-type]
        (folder / "saf" / "landscape.json").unlink()
        write_report([folder / "saf"])

    def command(self, word: str, work: Path, method: str) -> list[str]:
        """The command line of a word, on what `prepare` has put into ``work``."""
        experiment, run = str(self.experiment), str(work / method)
        given = {
            "train": ["train", experiment, *TRAIN, "--method", method, "--out", str(work / "run")],
            "resume": ["train", "--resume", str(work / f"{method}-half")],
            "compare": ["compare", experiment, *COMPARE.split(), "--out", str(work / "run")],
            "report": ["report", run, "--figures", str(work / "figures")],
            "sharpness": ["sharpness", run, "--trace", "--density"],
            "landscape": ["landscape", run, "--points", str(LANDSCAPE["points"])],
        }
        return [sys.executable, "-m", "flatmin", *given[word]]

    def prepare(self, word: str, work: Path, method: str) -> None:
        """Puts into ``work`` what the word works on."""
        (work / "tmp").mkdir(parents=True)
        if word not in ("train", "compare"):
            name = f"{method}-half" if word == "resume" else method
            shutil.copytree(self.folder / name, work / name)

    def undisturbed(self, word: str, method: str) -> float:
        """Seconds of the processor that it takes from its start to its end, whatever else the machine is doing."""
        if word not in self.seconds:
            with tempfile.TemporaryDirectory(dir=self.folder) as work:
                self.prepare(word, Path(work), method)
                with self.started(word, Path(work), method) as process:
                    *_, self.seconds[word] = _work(process)
                    if process.returncode != 0:
                        raise SystemExit(f"{word} fails by itself: {process.communicate()[1]}")
        return self.seconds[word]

    def started(self, word: str, work: Path, method: str) -> "subprocess.Popen[str]":
        """Starts the command and waits until it takes signals; before that they are Python's own."""
        process = subprocess.Popen(
            self.command(word, work, method),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=work,
            env={**os.environ, "TMPDIR": str(work / "tmp"), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        while process.poll() is None and not _takes(process.pid, signal.SIGTERM):
            time.sleep(0.002)
        return process

    def run(self, case: Case) -> None:
        """Runs one case and notes what is wrong."""
        seconds = self.undisturbed(case.word, case.method)
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as name:
            work = Path(name)
            self.prepare(case.word, work, case.method)
            before = {path: path.read_bytes() for path in work.rglob("*.*") if path.is_file()}
            process = self.started(case.word, work, case.method)
            next((True for done in _work(process) if done >= case.share * seconds), False)
            case.hit = process.poll() is None
            for number, kind in enumerate(SIGNALS[case.signal]):
                time.sleep(case.gap * bool(number))
                with suppress(ProcessLookupError):
                    (os.killpg if case.group else os.kill)(process.pid, kind)
            try:
                _, error = process.communicate(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                _, error = process.communicate()
                case.wrong.append("it did not end")
            case.code = process.returncode
            if not case.hit:
                return
            left = _left(process.pid)
            case.expect(not left, f"processes are left: {left}")
            for each in left:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            shared = [path.name for path in Path("/dev/shm").glob(f"*{process.pid}*")]
            case.expect(not shared, f"left in /dev/shm: {shared}")
            _check_files(case, work)
            if case.signal != "KILL":
                _check_words(case, error)
                _check_leftovers(case, work)
            CHECKS[case.word](self, case, work, before)


def _end_after(epochs: int) -> Callable[[dict[str, float]], None]:
    def end(metrics: dict[str, float]) -> None:
        if metrics["epoch"] + 1 == epochs:
            raise KeyboardInterrupt

    return end


def _takes(process: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def _processes(session: int) -> dict[int, float]:
    """The processes of a session that are alive, and the seconds of the processor that each has used."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of, *rest = path.read_text().rpartition(")")[2].split()
            if int(of) == session and state != "Z":
                found[int(path.parent.name)] = (int(rest[7]) + int(rest[8])) / os.sysconf("SC_CLK_TCK")
    return found


def _work(process: "subprocess.Popen[str]") -> Iterator[float]:
    """Seconds of the processor that the processes of a command have used, again and again until it ends."""
    used: dict[int, float] = {}
    while process.poll() is None:
        used.update(_processes(process.pid))
        yield sum(used.values())
        time.sleep(0.005)


def _left(session: int) -> list[int]:
    """The processes of a session that do not end within half a minute."""
    for _ in range(300):
        found = list(_processes(session))
        if not found:
            return []
        time.sleep(0.1)
    return found


def _check_files(case: Case, work: Path) -> None:
    """Every file under its own name is whole; after SIGKILL there may be others beside it."""
    for path in work.rglob("*"):
        if any(part.endswith((".new", ".old")) for part in path.relative_to(work).parts):
            continue
        try:
            if path.name == "state.json":
                load_checkpoint(path.parent)
            elif path.suffix == ".json" and not (path.name == "config.json" and path.stat().st_size == 0):
                json.loads(path.read_text())
            elif path.name == "metrics.jsonl":
                for line in path.read_text().splitlines():
                    json.loads(line)
            elif path.suffix == ".html":
                case.expect(path.read_text().rstrip().endswith("</html>"), f"{path.name} is cut short")
        except (ValueError, FlatminError) as error:
            case.wrong.append(f"{path.relative_to(work)}: {error}")


def _check_words(case: Case, error: str) -> None:
    """Exit code 2 and one line; or 0 and none, if all was done when the signal came."""
    said = [line for line in error.splitlines() if not PROGRESS.fullmatch(line)]
    case.line = "; ".join(said)
    if case.code == 0:
        case.expect(said == [], f"exit code 0, and it said {said}")
        return
    case.expect(case.code == 2, f"exit code {case.code}")
    one = len(said) == 1 and said[0].startswith("flatmin: ") and "interrupted" in said[0]
    case.expect(one, f"it said {error.splitlines()}")


def _check_leftovers(case: Case, work: Path) -> None:
    names = [path.name for path in work.rglob("*")]
    over = [name for name in names if name.endswith((".new", ".old")) or name == ".lock"]
    case.expect(not over, f"left over: {over}")
    over = [path.name for path in (work / "tmp").iterdir()]
    case.expect(not over, f"left in the folder for temporary files: {over}")


def _check_run(bench: Bench, case: Case, work: Path, before: dict[Path, bytes]) -> None:
    """A run goes on to where it would have been."""
    folder = work / ("run" if case.word == "train" else f"{case.method}-half")
    kept = (folder / "checkpoints" / "last").exists()
    if case.code == 2:
        done = len((folder / "metrics.jsonl").read_text().splitlines()) if kept else 0
        if f"epochs are kept in {folder}" in case.line:
            case.expect(kept and f"{done} of {EPOCHS}" in case.line, f"{done} epochs are there")
        else:
            case.expect("no epoch was done" in case.line or "before anything was done" in case.line, "what was kept?")
            case.expect(case.word == "resume" or not folder.exists(), "its folder is left")
    if case.word == "train" and not kept and not (folder / "metrics.jsonl").exists():
        return  # nothing to go on with, and nothing lost
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(lab.resume(folder).metrics)
    whole = bench.metrics[case.method]
    differ = [name for name in whole if name != "seconds" and found[name] != whole[name]]
    case.expect(not differ, f"gone on with, it differs in {differ}")


def _check_comparison(bench: Bench, case: Case, work: Path, before: dict[Path, bytes]) -> None:
    folder = work / "run"
    if case.signal == "KILL":
        return
    if case.code == 0 or "complete" in case.line:
        case.expect(len(json.loads((folder / "results.json").read_text())["seeds"]) == 2, "seeds are missing")
    elif "no epoch" in case.line or "before anything" in case.line or "nothing was done" in case.line:
        case.expect(not folder.exists(), f"left: {sorted(path.name for path in folder.rglob('*'))}")
    else:
        found = json.loads((folder / "results.json").read_text())
        case.expect(found["interrupted"], "the results do not say that it was interrupted")
        said = f"{len(found['seeds'])} seed"
        case.expect(f"{said} finished" in case.line or f"{said}s finished" in case.line, "seeds are miscounted")


def _check_written(name: str) -> "Callable[[Bench, Case, Path, dict[Path, bytes]], None]":
    """The file is the old one, or the new one; and the line says which."""

    def check(bench: Bench, case: Case, work: Path, before: dict[Path, bytes]) -> None:
        path = work / case.method / name
        same = path.exists() and path.read_bytes() == before.get(path)
        if case.code == 2:
            case.expect(path.exists() == (path in before) or "is written" in case.line, f"{name}: is it there?")
            case.expect(same or "is written" in case.line or path not in before, f"{name}: is it written?")
        if case.code == 0:
            case.expect(path.exists(), f"{name} is missing")

    return check


def _check_landscape(bench: Bench, case: Case, work: Path, before: dict[Path, bytes]) -> None:
    partial = work / case.method / "landscape.partial"
    if case.code == 2:
        case.expect(partial.exists() == ("landscape.partial" in case.line), "landscape.partial: is it there?")
    found = lab.measure_landscape(work / case.method, **LANDSCAPE).landscape.loss  # type: ignore[arg-type]
    case.expect(found == bench.losses, "gone on with, its losses differ")


CHECKS = {
    "train": _check_run,
    "resume": _check_run,
    "compare": _check_comparison,
    "report": _check_written("report.html"),
    "sharpness": _check_written("sharpness.json"),
    "landscape": _check_landscape,
}
WORDS = tuple(CHECKS)


def cases(seed: int, words: Sequence[str] = WORDS, methods: Sequence[str] = METHODS) -> Iterator[Case]:
    """Cases without end: every word with every signal in turn, the rest drawn."""
    draw = random.Random(seed)
    for number in itertools.count():
        around, place = divmod(number, len(words))
        word, kind = words[place], list(SIGNALS)[(around + place) % len(SIGNALS)]
        method = draw.choice(methods)
        own = method if word in ("train", "resume") else "saf"
        share = max(draw.random(), draw.random())  # the first half is spent importing torch
        yield Case(word, kind, draw.random() < 0.5, own, share, draw.uniform(0, 0.5))


def kill(bench: Bench, number: int, drawn: Iterator[Case], show: Callable[[str], None]) -> list[Case]:
    """Runs cases until so many have hit; returns all."""
    done: list[Case] = []
    while sum(case.hit for case in done) < number:
        case = next(drawn)
        bench.run(case)
        done.append(case)
        hits = sum(each.hit for each in done)
        how = f"{case.word} {case.signal}{' to the group' if case.group else ''} at {case.share:.2f}"
        show(f"{hits:4d} {how}: {case.code} {case.line}" + "".join(f"\n     WRONG {what}" for what in case.wrong))
    return done


def counts(done: list[Case]) -> list[dict[str, Any]]:
    """A row for each word and signal."""
    rows = []
    for word, kind in itertools.product(dict.fromkeys(case.word for case in done), SIGNALS):
        own = [case for case in done if (case.word, case.signal) == (word, kind)]
        hit = [case for case in own if case.hit]
        rows.append(
            {
                "word": word,
                "signal": kind,
                "kills": len(hit),
                "of_them_to_the_group": sum(case.group for case in hit),
                "had_ended_before": len(own) - len(hit),
                "finished_all_the_same": sum(case.code == 0 for case in hit),
                "wrong": sum(bool(case.wrong) for case in hit),
            }
        )
    return rows


def main() -> None:
    """Kills and writes the result; fails if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="kills that hit")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--words", default=",".join(WORDS), help="with commas")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load, started = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flatmin-kills-") as folder:
        bench = Bench(Path(folder))
        drawn = cases(arguments.seed, arguments.words.split(","))
        done = kill(bench, arguments.kills, drawn, lambda line: print(line.replace(folder, "."), flush=True))
    wrong = [case for case in done if case.wrong]
    result = {
        "command": f"python benchmarks/{command_line()}",
        **environment(),
        "load_average_before": load,
        "minutes": (time.monotonic() - started) / 60,
        "kills": sum(case.hit for case in done),
        "wrong": len(wrong),
        "counts": counts(done),
        "what_was_wrong": [{**vars(case), "line": case.line.replace(folder, ".")} for case in wrong],
    }
    write_json(arguments.out, result)
    print(f"{result['kills']} kills, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
