"""Time of a step of each optimizer, as ratios to the base optimizer's and to pytorch-optimizer's class of that name.

The steps of all are interleaved in one process, in an order drawn anew each round. The base stands there twice: the
ratio of one to the other says what the measurement is worth. All are around the same SGD. Both sides stand there as
they come and with ``foreach=True``, which the peer's pass on to SGD, so that flatmin's are then around such an SGD; it
is off by default on a CPU. The forward and backward passes of a step are counted, and stated with its time: by a
closure the peer's LookSAM makes two in every step, flatmin's 1.2. ESAM's second is of half of the batch, beside a
forward pass that is not counted.

In the last case there are no passes at all: the closure hands out gradients that are there already, so that what is
timed is the optimizers' own work. The peer's GSAM and ESAM, which make or weigh passes themselves, are left out there.

    python benchmarks/peers.py --out benchmarks/results/peers-cpu.json
"""

import argparse
import json
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
from flatmin.lab.problems.models import create_model
from flatmin.lab.runs.record import command_line, environment, write_json

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
PERIOD = 5  # LookSAM's, in steps


class Constant:
    """The schedule that the peer's GSAM asks for its rho."""

    def step(self) -> float:
        """The rho of flatmin's by default."""
        return 0.04


def their_gsam(model: nn.Module, **options: Any) -> Any:
    """The peer's GSAM, which is given an instance and makes its own passes."""
    base = torch.optim.SGD(model.parameters(), **SGD, **options)
    return peer.GSAM(model.parameters(), base, model, Constant(), alpha=0.01, **options)


THEIRS: dict[str, Callable[..., Any]] = {
    "SAM": lambda m, **o: peer.SAM(m.parameters(), torch.optim.SGD, rho=0.05, **SGD, **o),
    "ASAM": lambda m, **o: peer.SAM(m.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **SGD, **o),
    "GSAM": their_gsam,
    "LookSAM": lambda m, **o: peer.LookSAM(m.parameters(), torch.optim.SGD, rho=0.05, k=PERIOD, **SGD, **o),
    "FriendlySAM": lambda m, **o: peer.FriendlySAM(m.parameters(), torch.optim.SGD, rho=0.2, **SGD, **o),
}
FOREACH: dict[str, Any] = {"foreach": True}
PAIRS = {"flatmin": "peer", "flatmin, foreach": "peer, foreach"}


def many_small() -> nn.Module:
    """Two hundred layers of 16 x 16: 400 small tensors."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(200)))


NO_PASSES = "200 layers of 16x16, no passes"
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18, 4 images": (lambda: create_model("resnet18", 3, 10), (4, 3, 32, 32)),
    "200 layers of 16x16": (many_small, (32, 16)),
    NO_PASSES: (many_small, (32, 16)),
}


def make_step(
    kind: str, name: str, model: nn.Module, x: Tensor, y: Tensor, *, no_passes: bool = False
) -> Callable[[], object]:
    """A function that makes one step: of ``"base"``, or of a side of ``PAIRS``; the peer's want a gradient first."""
    options = FOREACH if kind.endswith("foreach") else {}
    base = torch.optim.SGD(model.parameters(), **SGD, **options)
    optimizer: Any = base
    if kind != "base":
        optimizer = OURS[name](base) if kind in PAIRS else THEIRS[name](model, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    if no_passes:
        parameters = list(model.parameters())
        made, loss = [torch.randn_like(parameter) for parameter in parameters], torch.zeros(())
        gradients = [torch.empty_like(parameter) for parameter in parameters]

        def closure() -> Tensor:
            torch._foreach_copy_(gradients, made)  # a method may change them in place
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return loss

    def losses(keep: Any) -> Tensor:
        return F.cross_entropy(model(x[keep]), y[keep], reduction="none")

    if kind in PAIRS.values() and name == "GSAM":
        return lambda: (optimizer.set_closure(F.cross_entropy, x, y), optimizer.step())
    if kind in PAIRS.values():
        return lambda: (closure(), optimizer.step(closure))
    return lambda: optimizer.step(losses if name == "ESAM" else closure)


def passes(step: Callable[[], object], model: nn.Module) -> float:
    """Forward passes with a gradient in a step, over one period."""
    seen: list[bool] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in range(PERIOD):
        step()
    handle.remove()
    return sum(seen) / PERIOD


def measure(case: str, seconds: float) -> dict[str, Any]:
    """Measures all rows of one case."""
    build, shape = CASES[case]
    x, y = torch.randn(*shape), torch.randint(10, (shape[0],))
    rows = [("base", "base"), ("base", "control"), *(("flatmin", n) for n in OURS)]
    rows += [(kind, name) for name in THEIRS for kind in ("flatmin, foreach", *PAIRS.values())]
    if no_passes := case == NO_PASSES:
        rows = [row for row in rows if row[1] not in ("GSAM", "ESAM")]
    models = {row: build() for row in rows}
    steps = {row: make_step(*row, models[row], x, y, no_passes=no_passes) for row in rows}
    counts = {row: passes(steps[row], models[row]) for row in rows}
    times: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    order, end, done = random.Random(0), 0.0, -2
    while done < 10 or time.perf_counter() < end:
        for row in order.sample(rows, len(rows)):
            count = PERIOD if row[1] == "LookSAM" else 1  # a whole period
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
    measured: list[dict[str, Any]] = [
        {
            "of": kind,
            "method": name,
            "passes": None if no_passes else counts[kind, name],
            "to_base": ratio((kind, name), base),
        }
        for kind, name in rows[1:]
    ]
    against: list[dict[str, Any]] = [
        {"method": name, "of": ours, "against": theirs, "time": ratio((ours, name), (theirs, name))}
        for name in THEIRS
        for ours, theirs in PAIRS.items()
        if (theirs, name) in times
    ]
    for line in against:
        print(f"{case}: {line['method']}, {line['time']['ratio']:.3f} of the time of {line['against']}", flush=True)
    base_ms = 1e3 * statistics.median(times[base])
    return {"case": case, "rounds": done, "base_ms": base_ms, "to_base": measured, "to_peer": against}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it has of other cases stays there")
    arguments = parser.parse_args()
    done = json.loads(arguments.out.read_text())["cases"] if arguments.out.exists() else []
    for case in arguments.cases:
        measured = {**measure(case, arguments.seconds), "command": f"python benchmarks/{command_line()}"}
        done = [each for each in done if each["case"] != case] + [measured]
        write_json(arguments.out, {**environment(), "cases": done})  # after each: the next may take long


if __name__ == "__main__":
    main()
