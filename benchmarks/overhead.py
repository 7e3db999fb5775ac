"""What each method costs: time of a training step as a ratio to the plain optimizer's, and memory.

The steps of all methods are interleaved in one process. On the CPU it measures ResNet-18 on 32x32 images and the small
networks of the comparisons; on a CUDA device also ResNet-50 at 224x224 (Table 1 of the paper), ViT-S and a network of
many small tensors, in blocks of steps with one wait at the end, with images/s, peak memory and how often the host waits
in a step, and MESA once more without its recorded graph.

    python benchmarks/overhead.py --out benchmarks/results/overhead-cpu.json
    python benchmarks/overhead.py --device cuda --out benchmarks/results/overhead-cuda.json

What a hyperparameter costs is measured as ``flatmin compare`` compares it, a row for each value:

    python benchmarks/overhead.py --models resnet18 --methods base,mesa --set mesa.fraction=1,0.5,0.25,0.125 --out ...
"""

import argparse
import copy
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from flatmin.errors import MissingDependencyError
from flatmin.lab.comparison.rows import Row, make_rows
from flatmin.lab.comparison.timing import measure_rows, synchronize
from flatmin.lab.methods import COMPARED, parse_settings
from flatmin.lab.problems.models import create_model, model_names
from flatmin.lab.problems.problem import Problem, base_optimizer
from flatmin.lab.recipe import Recipe, Run
from flatmin.lab.runs.record import command_line, environment, write_json
from flatmin.lab.training.trainer import Trainer

PLAIN = " capture=False"  # of rows in which MESA's average runs as it does on a CPU
SMALL_TENSORS = "mlp of 40 layers"  # many small tensors, where the host's fixed costs show
BATCHES_IN_DATASET = 4  # the batch stands among samples that are not in it, as it does in training


@dataclass(frozen=True)
class Case:
    """A network, the images it sees, and how: one block of rows of the result."""

    model: str
    image: tuple[int, ...]
    classes: int
    batch: int
    precision: str = "float32"
    channels_last: bool = False
    block: int = 1  # steps between two waits for the device


CPU = [
    Case("cnn", (1, 8, 8), 10, 128),
    Case("cnn1d", (1, 40), 10, 128),
    Case("resnet18", (3, 32, 32), 100, 32),
]
CUDA = [
    *(Case("resnet18", (3, 32, 32), 100, 128, precision, block=10) for precision in ("float32", "bfloat16")),
    *(
        Case("resnet50", (3, 224, 224), 1000, 128, precision, channels_last=True, block=4)
        for precision in ("float32", "bfloat16")
    ),
    Case("vit_small_patch16_224", (3, 224, 224), 1000, 128, "bfloat16", block=4),
    Case(SMALL_TENSORS, (64,), 100, 256, "bfloat16", block=10),
]


def find_model(case: Case) -> nn.Module:
    """Returns flatmin's own network of that name, or else torchvision's or timm's, whichever imports."""
    if case.model == SMALL_TENSORS:
        width = case.image[0]
        layers = [layer for _ in range(40) for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(width, case.classes))
    if case.model in model_names():
        return create_model(case.model, case.image[0], case.classes)
    try:
        return create_model(f"torchvision/{case.model}", case.image[0], case.classes)
    except MissingDependencyError:
        return create_model(f"timm/{case.model}", case.image[0], case.classes)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_batch(case: Case, device: str) -> Batch:
    """Returns the synthetic batch whose steps are measured: indices, images, classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, *case.image, generator=generator)
    y = torch.randint(case.classes, (case.batch,), generator=generator)
    index = torch.randperm(case.batch * BATCHES_IN_DATASET, generator=generator)[: case.batch]
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return index, x.to(device, memory_format=layout), y.to(device)


def build(case: Case, device: str, row: Row) -> Trainer:
    """Returns a trainer of one method on a data set of which only the length counts."""
    size = case.batch * BATCHES_IN_DATASET
    recipe = Recipe(model=case.model, batch_size=case.batch, precision=case.precision, device=device, lr=1e-3)

    def make_model() -> nn.Module:
        model = find_model(case)
        return model.to(memory_format=torch.channels_last) if case.channels_last else model  # type: ignore[call-overload]

    dataset = TensorDataset(torch.empty(size, 1), torch.zeros(size, dtype=torch.int64))
    problem = Problem(
        dataset, dataset, case.classes, make_model, None, lambda parameters: base_optimizer(recipe, parameters)
    )
    trainer = Trainer(Run(recipe, row.method, row.settings), problem)
    if row.label.endswith(PLAIN):
        trainer.trajectory.capture = False  # type: ignore[union-attr]  # it is MESA
    return trainer


def measure(case: Case, device: str, rows: list[Row], seconds: float) -> dict[str, Any]:
    """Measures all rows on one case."""
    batch = make_batch(case, device)
    costs, trainers = measure_rows(rows, lambda row: build(case, device, row), batch, seconds=seconds, block=case.block)
    base, measured = costs[0].full, []
    for given, trainer, cost in zip(rows, trainers, costs, strict=True):
        each = cost.full
        ratios = sorted(ours / plain for ours, plain in zip(each.seconds, base.seconds, strict=True))
        row: dict[str, Any] = {
            "method": given.label,
            "ratio": each.ratio(base),
            "ratio_of_a_step_that_does_not_pay": None if cost.plain is None else cost.plain.ratio(base),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "share_of_base_speed": 1 / each.ratio(base),
            "milliseconds": 1e3 * each.median(),
            "images_per_second": case.batch / each.median(),
            "extra_bytes": trainer.extra_bytes,
        }
        if trainer.device.type == "cuda":
            row["peak_bytes"] = _peak(trainer, batch)
            row["host_waits_in_step"] = _host_waits(trainer, batch)
        measured.append(row)
        print(
            f"{case.model} {case.precision} {given.label}: {row['ratio']:.3f} x, {row['milliseconds']:.2f} ms",
            flush=True,
        )
    return {**case.__dict__, "rounds": len(base.seconds), "rows": measured}


def _peak(trainer: Trainer, batch: Any) -> int:
    """Most bytes that a step allocates beyond what was there, with what the trainer itself keeps."""
    synchronize(trainer.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.step(*batch)
    synchronize(trainer.device)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *(p.grad for p in trainer.model.parameters())]
    if trainer.trajectory is not None:
        tensors += [*trainer.trajectory.parameters(), *trainer.trajectory.buffers()]
        history = getattr(trainer.trajectory, "history", None)  # SAF's, which is no submodule
        tensors += [] if history is None else [*history.buffers()]
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    kept = sum(tensor.nbytes for tensor in [*tensors, *state] if isinstance(tensor, torch.Tensor))
    return int(torch.cuda.max_memory_allocated() - before + kept)


def _host_waits(trainer: Trainer, batch: Any) -> int:
    """How often the host waits for the device, as the profiler counts it, its own waiting included: compare to base."""
    from torch.profiler import ProfilerActivity, profile

    synchronize(trainer.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        trainer.step(*batch)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    return sum(int(event.count) for event in profiled.key_averages() if event.key in waits)


def check(result: dict[str, Any]) -> None:
    """Says what a result does not prove: a control that is off, a step that waits.

    The method smoothing does the base's work but for a mean, which only a network of milliseconds feels, so its ratio
    shows what the measurement is worth.
    """
    rows = {row["method"]: row for row in result["rows"]}
    control = rows.get("smoothing", rows["base"])
    if control["milliseconds"] > 100 and abs(control["ratio"] - 1) > 0.01:
        print(f"{result['model']}: the control, smoothing, is off by more than 1 %: was the machine idle?")
    waits = {method: row.get("host_waits_in_step", 0) for method, row in rows.items()}
    more = {method: count for method, count in waits.items() if count > waits["base"]}
    if more:
        print(f"{result['model']}: steps that wait for the device more often than the base's {waits['base']}: {more}")


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--methods", default=",".join(COMPARED), help="methods, base first")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.NAME=VALUE[,VALUE...]")
    parser.add_argument("--models", default="", help="only these models, with commas")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure each case")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    cases = copy.copy(CUDA if arguments.device.startswith("cuda") else CPU)
    if arguments.models:
        cases = [case for case in cases if case.model in arguments.models.split(",")]
    rows = make_rows(arguments.methods.split(","), parse_settings(arguments.set), epochs=Recipe.epochs)
    if arguments.device.startswith("cuda"):
        rows += [replace(row, label=row.label + PLAIN) for row in rows if row.method == "mesa"]
    results = []
    for case in cases:
        results.append(measure(case, arguments.device, rows, arguments.seconds))
        # after each case, so that one that fails costs none of the others
        write_json(arguments.out, {"command": f"python benchmarks/{command_line()}", **environment(), "cases": results})
    for result in results:
        check(result)


if __name__ == "__main__":
    main()
