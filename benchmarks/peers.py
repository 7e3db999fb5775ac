"""Time of a step of each optimizer, as ratios to the base optimizer's and to pytorch-optimizer's class of that name.

The steps of all are interleaved in one process, in an order drawn anew each round. The base stands there twice: the
ratio of one to the other says what the measurement is worth. The peer's GSAM has another form, and no row.

    python benchmarks/peers.py --out benchmarks/results/peers-cpu.json
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_optimizer as peer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatmin
from flatmin.engine.record import command_line, environment, write_json
from flatmin.models import create_model

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
OURS: dict[str, Callable[[torch.optim.Optimizer], flatmin.optim.SharpnessAware]] = {
    "SAM": flatmin.SAM,
    "ASAM": flatmin.ASAM,
    "GSAM": flatmin.GSAM,
    "LookSAM": flatmin.LookSAM,
    "FriendlySAM": flatmin.FriendlySAM,
    "ESAM": flatmin.ESAM,
    "MSAM": flatmin.MSAM,
    "S2SAM": flatmin.S2SAM,
}
THEIRS: dict[str, Callable[[Any], Any]] = {
    "SAM": lambda p: peer.SAM(p, torch.optim.SGD, rho=0.05, **SGD),
    "ASAM": lambda p: peer.SAM(p, torch.optim.SGD, rho=0.5, adaptive=True, **SGD),
    "LookSAM": lambda p: peer.LookSAM(p, torch.optim.SGD, rho=0.05, k=5, **SGD),
    "FriendlySAM": lambda p: peer.FriendlySAM(p, torch.optim.SGD, rho=0.2, **SGD),
}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: create_model("resnet18", 3, 10), (32, 3, 32, 32)),
    "200 layers of 16x16": (lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(200))), (32, 16)),
}


def make_step(kind: str, name: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A function that makes one step: of ``"base"``, ``"flatmin"`` or ``"peer"``, which wants a gradient beforehand."""
    base = torch.optim.SGD(model.parameters(), **SGD)
    optimizer: Any = base
    if kind != "base":
        optimizer = OURS[name](base) if kind == "flatmin" else THEIRS[name](model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def losses(keep: Any) -> Tensor:
        return F.cross_entropy(model(x[keep]), y[keep], reduction="none")

    if kind == "peer":
        return lambda: (closure(), optimizer.step(closure))
    return lambda: optimizer.step(losses if name == "ESAM" else closure)


def measure(case: str, seconds: float) -> dict[str, Any]:
    """Measures all rows of one case."""
    build, shape = CASES[case]
    x, y = torch.randn(*shape), torch.randint(10, (shape[0],))
    rows = [("base", "base"), ("base", "control"), *(("flatmin", n) for n in OURS), *(("peer", n) for n in THEIRS)]
    steps = {row: make_step(*row, build(), x, y) for row in rows}
    times: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    order, end, done = random.Random(0), 0.0, -2
    while done < 10 or time.perf_counter() < end:
        for row in order.sample(rows, len(rows)):
            count = 5 if row[1] == "LookSAM" else 1  # a whole period
            start = time.perf_counter()
            for _ in range(count):
                steps[row]()
            times[row] += [(time.perf_counter() - start) / count] if done >= 0 else []
        done += 1
        end = time.perf_counter() + seconds if done == 0 else end

    def ratio(row: tuple[str, str], to: tuple[str, str]) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(times[row], times[to], strict=True)]
        return {"ratio": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2]}

    base = rows[0]
    measured = [{"of": kind, "method": name, "to_base": ratio((kind, name), base)} for kind, name in rows[1:]]
    against = [{"method": name, "flatmin_to_peer": ratio(("flatmin", name), ("peer", name))} for name in THEIRS]
    for line in against:
        print(case, line["method"], f"{line['flatmin_to_peer']['ratio']:.3f} of the peer's time", flush=True)  # type: ignore[index]
    return {"case": case, "rounds": done, "base_ms": 1e3 * statistics.median(times[base]), "rows": measured + against}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure each case")
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    cases = [measure(case, arguments.seconds) for case in arguments.cases.split(",")]
    write_json(arguments.out, {"command": f"python benchmarks/{command_line()}", **environment(), "cases": cases})


if __name__ == "__main__":
    main()
