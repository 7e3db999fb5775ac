"""How large a share of the training set `refresh` needs, and what an average is worth on the way.

A small residual network is trained on Fashion-MNIST, with a moving average of each horizon. After some epochs the test
accuracy of the network stands beside that of each average: with averaged batch-norm statistics, with each test batch's
own, and with statistics made anew from so many training images, drawn anew each time (the mean over the draws, and the
standard deviation between them, which says what a share too small costs).

    python benchmarks/refresh.py --out benchmarks/results/refresh.json
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fashion_resnet_experiment as experiment
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin import EMA
from flatmin.averages import ema_decay
from flatmin.lab.runs.record import command_line, environment

EPOCHS, BATCH, IMAGES = 20, 128, 10_000
HORIZONS = (1, 4)  # epochs
LOOKED_AT = (6, 11, 16, 20)  # after these epochs
SIZES = (128, 512, 2048, 8192)
DRAWS = 5
MOMENTUM, WEIGHT_DECAY, LR = 0.9, 5e-4, 0.1


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` that cover ``count``."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent, in evaluation mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        right = sum((model(x[part]).argmax(1) == y[part]).sum().item() for part in parts(len(y), 1000))
    model.train(was)
    return 100.0 * float(right) / len(y)


def average_row(ema: EMA, train: Tensor, test: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Any]:
    """Accuracies of an average as it is, with each batch's statistics, and with fresh ones of each size."""
    row: dict[str, Any] = {"averaged": accuracy(ema, *test)}
    for size in (*SIZES, len(train)):
        draws = []
        for _ in range(DRAWS if size < len(train) else 1):
            chosen = train[torch.randperm(len(train), generator=generator)[:size]]
            fresh = deepcopy(ema)
            fresh.refresh(chosen[part] for part in parts(size, BATCH))
            draws.append(accuracy(fresh, *test))
        row[f"fresh {size}"] = {"mean": fmean(draws), "between draws": stdev(draws) if len(draws) > 1 else None}
    own = deepcopy(ema)
    own.statistics = "batch"
    row["batch"] = accuracy(own, *test)
    return row


def train_seed(seed: int) -> list[dict[str, Any]]:
    """One training: a row for each epoch that is looked at and each horizon."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (x, y), test = _tensors(experiment.train_set()), _tensors(experiment.test_set())
    chosen = torch.randperm(len(x), generator=generator)[:IMAGES]
    x, y = x[chosen], y[chosen]
    model = experiment.model()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    averages = {horizon: EMA(model, decay=ema_decay(horizon, steps)) for horizon in HORIZONS}
    for ema in averages.values():
        ema.attach(optimizer)
    rows = []
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(len(x), generator=generator)
        for part in parts(steps * BATCH, BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[order[part]]), y[order[part]])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch in LOOKED_AT:
            shared = {"seed": seed, "epoch": epoch, "network": accuracy(model, *test), "train": accuracy(model, x, y)}
            rows += [
                {**shared, "horizon": horizon, **average_row(ema, x, test, generator)}
                for horizon, ema in averages.items()
            ]
            print(json.dumps(rows[-len(averages) :]), flush=True)
    return rows


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def main() -> None:
    """Trains with each seed, writes all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for seed in range(arguments.seeds) for row in train_seed(seed)]
    arguments.out.write_text(json.dumps({"command": command_line(), **environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
