"""What the history of SAF takes for ImageNet-1k and ImageNet-21k: bytes, resident memory, time to write and to read.

For ImageNet-1k every sample's outputs go through the history in every epoch, in batches, as in training: one epoch that
is only looked at (the low-rank form has no basis yet), then `lag` that are remembered, so that every byte of every slot
is written, then `lag` that read them. Outputs are sums of two rows of a pool of random ones, most of whose variance is
in some sixty directions. For ImageNet-21k an epoch would be 310 billion logits; there a few batches go the whole way,
and every row of every slot is written and read in the store, as encoded from a pool. Each case has its own process, and
replaces its older result in the file.

    python benchmarks/history.py --out benchmarks/results/history.json
    python benchmarks/history.py --datasets imagenet-1k --forms half --path /scratch --out half.json
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatmin.history import History, make_history
from flatmin.lab.runs.record import command_line, environment, write_json

LAG, TEMPERATURE = 3, 5.0
DIRECTIONS, NOISE = 64, 0.3  # of the pool's rows; the noise's share lies in no few directions
STRIDE = 7_368_787  # a prime: multiples of it visit all samples, far from one another
CHECKED_EVERY = 16  # batches whose rows are compared with what was written
LEAST_COSINE = {"dense": 0.9999, "half": 0.9999, "int8": 0.999, "int6": 0.998, "int4": 0.97, "topk": 0.999}


@dataclass(frozen=True)
class Shape:
    """A data set's shape, and how much of it goes the whole way."""

    name: str
    num_samples: int
    num_classes: int
    whole: bool  # every sample's outputs are encoded and compared; or only those of `batches` batches
    batch: int = 1024
    pool: int = 4096
    batches: int = 16
    goals: tuple[tuple[str, int], ...] = ()  # a form and the most bytes it may take


SHAPES = [
    Shape(
        "imagenet-1k",
        1_281_167,
        1000,
        whole=True,
        goals=(("lowrank", 400_000_000), ("int6", LAG * 1_281_167 * 1000 * 4 // 4)),
    ),
    Shape("imagenet-21k", 14_197_122, 21_841, whole=False, goals=(("lowrank", 5_000_000_000),)),
]


class Clock:
    """Adds up the seconds spent in it and counts how often."""

    def __init__(self) -> None:
        self.seconds, self.times = 0.0, 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.times += 1

    def summary(self, batch: int) -> dict[str, Any]:
        """As it goes into the result."""
        each = self.seconds / max(self.times, 1)
        return {"batches": self.times, "batch": batch, "seconds": self.seconds, "milliseconds_per_batch": 1e3 * each}


class Outputs:
    """What a network could have said of a sample in an epoch, without keeping it."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(shape.pool, DIRECTIONS, generator=generator)
        directions = torch.randn(DIRECTIONS, shape.num_classes, generator=generator) / DIRECTIONS**0.5
        self.pool: Tensor = factors @ directions
        for rows in torch.split(self.pool, 256):
            rows += NOISE * torch.randn(rows.shape, generator=generator)
        self.whole = shape.whole

    def number(self, index: Tensor, epoch: int) -> Tensor:
        """The row of the pool that a sample has in an epoch."""
        return (index + 977 * epoch) % len(self.pool)

    def __call__(self, index: Tensor, epoch: int) -> Tensor:
        rows: Tensor = self.pool[self.number(index, epoch)]
        if self.whole:  # one of a sample's own, so that hardly two samples agree
            rows += self.pool[(index // len(self.pool) * 31 + 7 * index) % len(self.pool)]
        return rows


def batches(num_samples: int, size: int) -> Iterator[Tensor]:
    """All samples, in an order that jumps about."""
    for start in range(0, num_samples, size):
        yield torch.arange(start, min(start + size, num_samples)) * STRIDE % num_samples


def resident() -> dict[str, int]:
    """Bytes of main memory that this process holds, now and at most."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(status[key].split()[0]) for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


class Cosines:
    """Of rows, less their mean, which no softmax feels: numbers alone, since tensors kept would scatter the heap."""

    def __init__(self) -> None:
        self.total, self.least, self.count = 0.0, 1.0, 0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Compares the rows of two tensors."""
        left, right = (each - each.mean(1, keepdim=True) for each in (left, right))
        cosines = torch.cosine_similarity(left, right, dim=1)
        self.total += float(cosines.sum())
        self.least = min(self.least, float(cosines.min()))
        self.count += len(cosines)

    def summary(self) -> dict[str, float]:
        """As it goes into the result."""
        return {"mean": self.total / self.count, "least": self.least}


class Reader:
    """Reads batches back and compares them with what was written."""

    def __init__(self, history: History, outputs: Outputs) -> None:
        self.history, self.outputs = history, outputs
        self.clock, self.count = Clock(), 0
        self.tags_exact, self.cosines, self.control = True, Cosines(), Cosines()

    def __call__(self, index: Tensor, epoch: int) -> None:
        present, then = self.outputs(index, epoch), epoch - LAG
        with self.clock:
            _, past, counts = self.history.recall(index, present, epoch)
        rows, tags = self.history.store.read(index, epoch % LAG, present.device, None)
        self.tags_exact = self.tags_exact and bool(counts.all()) and bool((tags == then).all())
        if self.count % CHECKED_EVERY == 0:
            # Over the outcomes that the form has, less top-k's "another one", which is large in every row.
            outcomes = past.shape[1] if past.shape[1] == present.shape[1] else past.shape[1] - 1
            for logits, cosines in ((self.outputs(index, then), self.cosines), (present, self.control)):
                other, _ = self.history.codec.compare(logits, rows, then)
                cosines.add(past[:, :outcomes], other[:, :outcomes])
        self.count += 1

    def summary(self) -> dict[str, Any]:
        """As it goes into the result."""
        return {
            "epoch_tags_exact": self.tags_exact,
            "rows_compared": self.cosines.count,
            "cosine_with_written": self.cosines.summary(),
            "cosine_with_present": self.control.summary(),
        }


def measure(shape: Shape, form: str, path: str | None = None) -> dict[str, Any]:
    """Fills and reads one history."""
    torch.set_num_threads(1)
    n, classes = shape.num_samples, shape.num_classes
    outputs = Outputs(shape)
    for _ in range(2):  # what torch takes at first is not the history's
        outputs(torch.arange(shape.batch), 0) @ outputs.pool[:128].T
    before, start = resident(), time.perf_counter()
    history = make_history(form, n, classes, lag=LAG, temperature=TEMPERATURE, path=path)
    write, reader = Clock(), Reader(history, outputs)
    some = list(batches(n, shape.batch))[: shape.batches]
    store: dict[str, Clock] = {}
    for epoch in range(LAG + 1):
        for index in batches(n, shape.batch) if shape.whole else some:
            logits = outputs(index, epoch)
            with write:
                history.exchange(index, logits, epoch, compare=False)
        if not shape.whole:
            _write_all(history, outputs, epoch, store.setdefault("write", Clock()), shape)
        print(f"{shape.name} {form}: epoch {epoch} written, {time.perf_counter() - start:.0f} s", flush=True)
    for epoch in range(LAG + 1, 2 * LAG + 1):
        if not shape.whole:
            _read_all(history, epoch, store.setdefault("read", Clock()), shape)
        for index in batches(n, shape.batch) if shape.whole else some:
            reader(index, epoch)
    after = resident()
    dense = LAG * n * classes * 4
    most = dict(shape.goals).get(form)
    result = {
        **{name: value for name, value in asdict(shape).items() if name in ("name", "num_samples", "num_classes")},
        "form": form,
        "lag": LAG,
        "on_disk": path is not None,
        "nbytes": history.nbytes,
        "row_bytes": history.row_bytes,
        "bytes_per_sample": history.nbytes / n,
        "dense_bytes": dense,
        "share_of_dense": history.nbytes / dense,
        "goal_bytes": most,
        "meets_goal": None if most is None else history.nbytes <= most,
        "resident_growth": after["now"] - before["now"],
        "resident_peak_growth": after["peak"] - before["now"],
        "outputs_encoded": "of every sample in every epoch" if shape.whole else f"of {shape.batches} batches an epoch",
        "write": write.summary(shape.batch),
        "read": reader.clock.summary(shape.batch),
        **reader.summary(),
        "load_average": os.getloadavg()[0],
        "seconds": time.perf_counter() - start,
    }
    if store:
        result["every_row_of_every_slot"] = (
            f"written to the store and read from it, encoded from a pool of {shape.pool} outputs; equal to the byte"
        )
        result["store"] = {name: clock.summary(_many(shape)) for name, clock in store.items()}
    return result


def _many(shape: Shape) -> int:
    """Samples in a batch that is not encoded."""
    return 64 * shape.batch


def _write_all(history: History, outputs: Outputs, epoch: int, clock: Clock, shape: Shape) -> None:
    """Writes every sample's row of an epoch, as encoded from the pool, and reads it again."""
    with torch.no_grad():
        encoded = [history.codec.encode(rows) for rows in torch.split(outputs.pool, shape.batch)]
    rows, whole = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    if not whole.all():  # of the epoch without a basis: nothing to keep
        return
    for index in batches(shape.num_samples, _many(shape)):
        given, tags = rows[outputs.number(index, epoch)], torch.full((len(index),), epoch, dtype=torch.int32)
        with clock:
            history.store.write(index, epoch % LAG, given, tags, None)
        read, epochs = history.store.read(index, epoch % LAG, torch.device("cpu"), None)
        if not (torch.equal(read, given) and torch.equal(epochs, tags)):
            raise SystemExit(f"{shape.name}: what was written in epoch {epoch} is not what is read")


def _read_all(history: History, epoch: int, clock: Clock, shape: Shape) -> None:
    """Reads every sample's row of ``lag`` epochs ago, once all slots are full; each must be of that epoch."""
    for index in batches(shape.num_samples, _many(shape)):
        with clock:
            _, epochs = history.store.read(index, epoch % LAG, torch.device("cpu"), None)
        if not (epochs == epoch - LAG).all():
            raise SystemExit(f"{shape.name}: rows of epoch {epoch - LAG} are of another")


def check(case: dict[str, Any]) -> str:
    """Says what is wrong with a case, or nothing."""
    wrong = []
    if case["meets_goal"] is False:
        wrong.append(f"takes {case['nbytes']} bytes, and {case['goal_bytes']} are the goal")
    if not case["epoch_tags_exact"]:
        wrong.append("rows are of another epoch than they should be")
    if case["cosine_with_written"]["mean"] < LEAST_COSINE.get(case["form"], 0.9):
        wrong.append("rows are not what was written")
    if case["cosine_with_present"]["mean"] > case["cosine_with_written"]["mean"] - 0.01:
        wrong.append("the present is as near as what was written: the check shows nothing")
    return f"{case['name']} {case['form']}: {'; '.join(wrong)}" if wrong else ""


def table(cases: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| data set | form | GB | bytes per sample | of dense | resident GB | write, ms | read, ms | cosine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        lines.append(
            f"| {case['name']} | {case['form']} | {case['nbytes'] / 1e9:.3f} | {case['bytes_per_sample']:.0f} | "
            f"{case['share_of_dense']:.2%} | {case['resident_growth'] / 1e9:.3f} | "
            f"{case['write']['milliseconds_per_batch']:.1f} | {case['read']['milliseconds_per_batch']:.1f} | "
            f"{case['cosine_with_written']['mean']:.4f} |"
        )
    return "\n".join(lines)


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["name"], case["form"], case["on_disk"]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", default="imagenet-1k,imagenet-21k", help="with commas")
    parser.add_argument(
        "--forms", default="", help="with commas; lowrank, topk and, for ImageNet-1k, int6 if not given"
    )
    parser.add_argument("--path", help="a folder for a scratch file in which the rows are kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = json.loads(arguments.out.read_text())["cases"] if arguments.out.exists() else []
    for shape in SHAPES:
        usual = "lowrank,topk,int6" if shape.whole else "lowrank,topk"
        forms = (arguments.forms or usual).split(",")
        for form in forms if shape.name in arguments.datasets.split(",") else []:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                case = process.submit(measure, shape, form, arguments.path).result()
            case = {"command": f"python benchmarks/{command_line()}", **case}
            cases = [each for each in cases if _key(each) != _key(case)] + [case]
            # after each case, so that one that fails costs none of the others
            write_json(arguments.out, {**environment(), "cases": cases})
    print(table(cases))
    wrong = [said for case in cases if (said := check(case))]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
